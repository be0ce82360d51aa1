"""What a step took on a rank, or on all: times, bytes, throughput, for a log, for TensorBoard or for any logger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.timing import Timeline


@dataclass(frozen=True, slots=True)
class Work:
    """What a step was for, as its user knows it; PipelineUsageError where that cannot be."""

    tokens: float | None = None
    flops: float | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "flops", "peak_flops"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PipelineTypeError(f"{name} must be a number, got {type(value).__name__}: give {_MEANS[name]}")
            if not 0 < value < float("inf"):
                raise PipelineUsageError(f"{name} is {value}: give {_MEANS[name]}, more than 0")
        if self.peak_flops is not None and self.flops is None:
            raise PipelineUsageError(
                f"peak_flops was given without flops, and utilisation is the share of the one in the other: give "
                f"{_MEANS['flops']}"
            )


_MEANS = {
    "tokens": "the tokens of the whole batch",
    "flops": "the floating-point operations of the whole model in the step, such as 6 * parameters * tokens",
    "peak_flops": "the floating-point operations a second that one rank's device is capable of",
}


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What the last step took on one rank.

    Two clocks tell times, and on an accelerator they tell different things: its host only queues the work, and runs
    ahead of it. Times whose names begin with ``host_`` are the host's, of the thread that called ``step()``. The others
    are those of the device that computes: on a CPU the host's own clock, on an accelerator its compute lane's, which
    knows how long the step took and, only where ``record_timeline`` was set, what of it was compute and waiting.
    """

    rank: int
    """This rank's number in the pipeline's group."""
    training: bool
    """Whether the step had a backward; False for ``eval()``."""
    step_s: float
    """Seconds. On a CPU from when this rank was in the step until every rank had ended it; on an accelerator from
    the beginning of its first action to the end of its last. Cutting the batch, dividing gradients and the optimizer
    are not in it."""
    compute_s: float | None
    """Seconds in forwards, backwards and functions that stand for them. None on an accelerator without a timeline."""
    waiting_s: float | None
    """Seconds in which this rank stood still for others: for messages, for room to send and, on a CPU, for the end of
    the step on all ranks. None on an accelerator without a timeline."""
    host_step_s: float
    """Seconds of the host from when it was in the step until every rank's host had ended it. On an accelerator its work
    may go on after that; on a CPU this is ``step_s``."""
    host_waiting_s: float
    """Seconds in which the host stood still for other ranks. On a CPU this is ``waiting_s``."""
    sent_bytes: int
    """Bytes of the tensors that this rank sent to others."""
    received_bytes: int
    """Bytes of the tensors that came from other ranks."""
    tokens_per_s: float | None = None
    """Tokens a second of the whole pipeline; None where they were not told."""
    flops_per_s: float | None = None
    """Floating-point operations a second of the whole pipeline; None where they were not told."""
    mfu: float | None = None
    """Model FLOPs utilisation, from 0 to 1: ``flops_per_s`` as a share of what all ranks' devices are capable of; None
    where either was not told."""

    @property
    def bubble(self) -> float | None:
        """The share of the step in which this rank did not compute, from 0 to 1. None where ``compute_s`` is."""
        return None if self.compute_s is None else max(0.0, 1.0 - _share(self.compute_s, self.step_s))

    def gather(self, group: dist.ProcessGroup | None = None) -> PipelineMetrics | None:
        """All ranks' metrics on the group's rank 0, None on the others; a collective call on the process group."""
        size = dist.get_world_size(group)
        rows: list[Any] | None = [None] * size if dist.get_rank(group) == 0 else None
        dist.gather_object(self, rows, group=group, group_dst=0)
        return None if rows is None else PipelineMetrics(tuple(rows))

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Every number that is known, by its field's name after ``prefix``; ``bubble`` too, rank and mode not."""
        values = {name: getattr(self, name) for name in _NUMBERS}
        return {prefix + name: float(value) for name, value in values.items() if value is not None}

    def to_tensorboard(self, writer: Any, step: int, prefix: str = "pipeline/") -> None:
        """Add every number of :meth:`as_dict` to a ``SummaryWriter``, or whatever else has its ``add_scalar``."""
        _add_scalars(writer, self.as_dict(prefix), step)

    def line(self) -> str:
        """One line for a log."""
        parts = [f"step {_time(self.step_s)}"]
        if self.compute_s is not None and self.waiting_s is not None:
            parts += [
                f"compute {_time(self.compute_s)}",
                f"waiting {_time(self.waiting_s)}",
                f"bubble {self.bubble:.0%}",
            ]
        else:
            parts.append(f"host {_time(self.host_step_s)} of which waiting {_time(self.host_waiting_s)}")
        parts += [f"sent {_scaled(self.sent_bytes)}B", f"received {_scaled(self.received_bytes)}B"]
        return f"rank {self.rank}: " + ", ".join(parts + _throughput(self.tokens_per_s, self.flops_per_s, self.mfu))


_NUMBERS = (
    "step_s",
    "compute_s",
    "waiting_s",
    "bubble",
    "host_step_s",
    "host_waiting_s",
    "sent_bytes",
    "received_bytes",
    "tokens_per_s",
    "flops_per_s",
    "mfu",
)


@dataclass(frozen=True, slots=True)
class PipelineMetrics:
    """What one step took on every rank, as :meth:`StepMetrics.gather` brings it together."""

    ranks: tuple[StepMetrics, ...]
    """One rank's metrics each, in the order of the group that they were gathered in."""

    @property
    def step_s(self) -> float:
        """Seconds of the rank that took longest."""
        return max(row.step_s for row in self.ranks)

    @property
    def bubble(self) -> float | None:
        """The share of all ranks' time in which they did not compute, from 0 to 1; None where a rank's is not known."""
        computed = [row.compute_s for row in self.ranks if row.compute_s is not None]
        if len(computed) < len(self.ranks):
            return None
        return max(0.0, 1.0 - _share(sum(computed), len(self.ranks) * self.step_s))

    def maxima(self) -> dict[str, float]:
        """The largest of each number that every rank knows, by the names of :meth:`StepMetrics.as_dict`."""
        return self._over_ranks(max)

    def means(self) -> dict[str, float]:
        """The mean over the ranks of each number that every rank knows."""
        return self._over_ranks(fmean)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """``step_s_max``, ``step_s_mean`` and so on, after ``prefix``."""
        maxima, means = self.maxima(), self.means()
        return {
            f"{prefix}{name}_{which}": values[name]
            for name in maxima
            for which, values in (("max", maxima), ("mean", means))
        }

    def to_tensorboard(self, writer: Any, step: int, prefix: str = "pipeline/") -> None:
        """Add every number of :meth:`as_dict` to a ``SummaryWriter``, or whatever else has its ``add_scalar``."""
        _add_scalars(writer, self.as_dict(prefix), step)

    def line(self) -> str:
        """One line for a log, with the ranks that computed and waited most."""
        maxima, means = self.maxima(), self.means()
        parts = [f"step {_time(self.step_s)}"]
        for name, text in (("compute_s", "compute"), ("waiting_s", "waiting"), ("host_step_s", "host")):
            if name in means and (name != "host_step_s" or "compute_s" not in means):
                most = max(self.ranks, key=lambda row: getattr(row, name)).rank
                parts.append(f"{text} {_time(means[name])} (at most {_time(maxima[name])}, rank {most})")
        if self.bubble is not None:
            parts.append(f"bubble {self.bubble:.0%}")
        parts.append(f"sent {_scaled(sum(row.sent_bytes for row in self.ranks))}B")
        known = (means.get(name) for name in ("tokens_per_s", "flops_per_s", "mfu"))
        return f"{len(self.ranks)} ranks: " + ", ".join(parts + _throughput(*known))

    def _over_ranks(self, of: Callable[[list[float]], float]) -> dict[str, float]:
        rows = [row.as_dict() for row in self.ranks]
        return {name: of([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


def metrics_of(
    executor: _C.Executor, timeline: Callable[[], Timeline], work: Work, *, rank: int, ranks: int
) -> StepMetrics:
    """Of the executor's last step; on an accelerator once it is past the step."""
    totals = executor.totals()
    host_step_s, host_waiting_s = totals.step_ns * 1e-9, totals.waited_ns * 1e-9
    step_s, compute_s, waiting_s = host_step_s, None, None
    lane_seconds = executor.lane_seconds()
    if lane_seconds is None:
        compute_s, waiting_s = totals.compute_ns * 1e-9, host_waiting_s
    else:
        step_s, recorded = lane_seconds, timeline()
        if recorded.spans:
            compute_s, waiting_s = recorded.busy(rank), recorded.waiting(rank)
    flops_per_s = _rate(work.flops, step_s)
    return StepMetrics(
        rank=rank,
        training=totals.training,
        step_s=step_s,
        compute_s=compute_s,
        waiting_s=waiting_s,
        host_step_s=host_step_s,
        host_waiting_s=host_waiting_s,
        sent_bytes=totals.sent_bytes,
        received_bytes=totals.received_bytes,
        tokens_per_s=_rate(work.tokens, step_s),
        flops_per_s=flops_per_s,
        mfu=None if flops_per_s is None or work.peak_flops is None else flops_per_s / (work.peak_flops * ranks),
    )


def _rate(amount: float | None, seconds: float) -> float | None:
    # A rank without an action takes no time at all on a device.
    return None if amount is None or seconds <= 0.0 else amount / seconds


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


def _add_scalars(writer: Any, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def _throughput(tokens: float | None, flops: float | None, mfu: float | None) -> list[str]:
    texts = (
        tokens and f"{tokens:,.0f} tokens/s",
        flops and f"{_scaled(flops)}FLOP/s",
        mfu and f"MFU {mfu:.1%}",
    )
    return [text for text in texts if text]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1.0 else f"{seconds * 1e3:.3g} ms"


def _scaled(value: float) -> str:
    """Three digits and what goes before a unit: "1.23 M"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}"
