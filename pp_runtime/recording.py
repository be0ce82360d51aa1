"""What a training run did, step by step, in one file: for ``python -m pp_runtime report``."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from pp_runtime._version import __version__
from pp_runtime.building import BuiltPipeline
from pp_runtime.errors import PipelineUsageError
from pp_runtime.pictures import RUN_VERSION, write_chrome
from pp_runtime.running import PipelineMetrics, StepMetrics
from pp_runtime.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from pp_runtime.timing import Timeline


@dataclass(frozen=True, slots=True)
class _Row:
    metrics: StepMetrics
    values: Mapping[str, float]


class _Series:
    """Rows by their step; past twice ``most`` only every second one is kept, then every fourth."""

    def __init__(self, most: int) -> None:
        self.rows: dict[int, _Row] = {}
        self._most, self._stride, self._added = most, 1, 0

    def add(self, step: int, row: _Row) -> None:
        if self._added % self._stride == 0:
            self.rows[step] = row
        self._added += 1
        if len(self.rows) > 2 * self._most:
            self.rows = dict(list(self.rows.items())[::2])
            self._stride *= 2


class RunRecord:
    """Notes what steps take, and what a program says of them, on every rank; saves it for a report.

    Notes are kept in memory and cost what ``metrics()`` of the schedule costs. Past twice ``most_steps`` every second
    one is dropped.
    """

    def __init__(
        self,
        schedule: PipelineScheduleSingle | PipelineScheduleMulti | BuiltPipeline,
        *,
        title: str = "",
        most_steps: int = 1000,
    ) -> None:
        if most_steps < 1:
            raise PipelineUsageError(f"most_steps is {most_steps}: a record keeps a step or more")
        self._schedule = schedule.schedule if isinstance(schedule, BuiltPipeline) else schedule
        self._title = title
        self._series = {training: _Series(most_steps) for training in (True, False)}
        self._timeline: tuple[int, Timeline] | None = None
        self._next = 0

    def add(
        self,
        step: int | None = None,
        *,
        tokens: float | None = None,
        flops: float | None = None,
        peak_flops: float | None = None,
        **values: float,
    ) -> StepMetrics:
        """Note the last ``step()`` or ``eval()``, and numbers of yours: ``loss=``, ``learning_rate=``.

        Every rank calls it with the same ``step``, counted from 0 if not given; a number may be known on some ranks
        only, and be NaN on the others.
        ``tokens``, ``flops`` and ``peak_flops`` are those of the schedule's ``metrics``, which this returns. If the
        step recorded its timeline, that is kept in the place of the one before.
        """
        metrics = self._schedule.metrics(tokens=tokens, flops=flops, peak_flops=peak_flops)
        number = self._next if step is None else int(step)
        if metrics.training:
            self._next = number + 1
            if self._schedule.record_timeline:
                self._timeline = number, self._schedule.timeline()
        row = _Row(metrics, {name: value for name, v in values.items() if not math.isnan(value := float(v))})
        self._series[metrics.training].add(number, row)
        return metrics

    def save(self, path: str | Path) -> None:
        """Write the file, on the rank that is the first of the pipeline's group; a collective call.

        It is a Chrome trace that ui.perfetto.dev opens too, of the last step that recorded its timeline, if one did.
        PipelineUsageError, on every rank, if nothing was added, or if the ranks noted different steps.
        """
        group = self._schedule._stages[0].group
        timeline = self._gathered_timeline(group)
        device = _device_name(self._schedule._stages[0].device)
        own = _Share(self._rows(), self._memory(), device, socket.gethostname())
        shares: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shares, own, group=group)
        common = _common_keys([share.rows for share in shares])
        if dist.get_rank(group) != 0:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        run = {
            "version": RUN_VERSION,
            "title": self._title or f"{self._name} on {len(shares)} ranks",
            "facts": self._facts(shares),
            "columns": _columns([[share.rows[key] for share in shares] for key in common], common),
            "ranks": [_medians(rank, share.rows) for rank, share in enumerate(shares)],
            "memory": {"heads": shares[0].memory[0], "rows": [share.memory[1] for share in shares]},
            "timeline_step": None if timeline is None else timeline[0],
        }
        write_chrome(path, {} if timeline is None else {"measured": timeline[1]}, more=_finite(run))

    @property
    def _name(self) -> str:
        return type(self._schedule).__name__.removeprefix("Schedule")

    def _facts(self, shares: Sequence[_Share]) -> dict[str, Any]:
        hosts = {share.host for share in shares}
        return {
            "schedule": self._name,
            "ranks": len(shares),
            "stages": self._schedule._stages[0].num_stages,
            "microbatches": self._schedule._n_microbatches,
            "devices": ", ".join(sorted({share.device for share in shares})),
            "hosts": len(hosts),
            "torch": torch.__version__,
            "pp_runtime": __version__,
            "saved": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        }

    def _gathered_timeline(self, group: Any) -> tuple[int, Timeline] | None:
        """All ranks', if all recorded the same step."""
        step = None if self._timeline is None else self._timeline[0]
        steps: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(steps, step, group=group)
        if self._timeline is None or any(other != step for other in steps):
            return None
        return self._timeline[0], self._timeline[1].gather(group)

    def _rows(self) -> dict[tuple[int, bool], _Row]:
        return {(step, kind): row for kind, series in self._series.items() for step, row in series.rows.items()}

    def _memory(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The heads and this rank's row of the memory report."""
        if not self._rows():
            return (), ()
        heads, row = self._schedule.memory_report().rows()
        return heads, row


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank has to say."""

    rows: Mapping[tuple[int, bool], _Row]
    memory: tuple[tuple[str, ...], tuple[str, ...]]
    device: str
    host: str


def _common_keys(rows: Sequence[Mapping[tuple[int, bool], _Row]]) -> list[tuple[int, bool]]:
    common = sorted(set.intersection(*(set(each) for each in rows)))
    if not common:
        empty = [rank for rank, each in enumerate(rows) if not each]
        raise PipelineUsageError(
            f"ranks {empty} added no step to the record: call add() after steps, on every rank"
            if empty
            else "the ranks added different steps to the record: call add() with the same numbers on every rank"
        )
    return common


def _columns(table: Sequence[Sequence[_Row]], keys: Sequence[tuple[int, bool]]) -> dict[str, list[Any]]:
    """Each number over the steps: of all ranks together, or of the first rank that has it."""
    rows: list[dict[str, Any]] = []
    for ranks, (step, training) in zip(table, keys, strict=True):
        metrics = PipelineMetrics(tuple(row.metrics for row in ranks))
        sums = {name: sum(getattr(row.metrics, name) for row in ranks) for name in ("sent_bytes", "received_bytes")}
        known = {"step": step, "training": training, **metrics.means(), **sums, "step_s": metrics.step_s}
        known["bubble"] = metrics.bubble
        for row in ranks:
            known = {**row.values, **known}
        rows.append(known)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _medians(rank: int, rows: Mapping[tuple[int, bool], _Row]) -> dict[str, Any]:
    """What a training step usually is on one rank."""
    found: dict[str, Any] = {"rank": rank}
    for name in ("step_s", "compute_s", "waiting_s"):
        values = [getattr(row.metrics, name) for (_, training), row in rows.items() if training]
        values = [value for value in values if value is not None]
        found[name] = median(values) if values else None
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def _finite(value: Any) -> Any:
    """With None in the place of what JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
