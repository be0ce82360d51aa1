"""The one call: a model, ranks and their memory in; every choice, and which to take, out."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pp_runtime.advising.advice import Advice, Setting, advise_for
from pp_runtime.advising.stage_costs import LinkSpeed
from pp_runtime.advising.tally import DeviceSpeed
from pp_runtime.advising.unit_row import Sample, UnitRow
from pp_runtime.advising.units import Unit, count_units, measure_units
from pp_runtime.errors import PipelineUsageError
from pp_runtime.microbatch import split_args_kwargs_into_chunks, split_target
from pp_runtime.orders import ORDERS, schedule_name
from pp_runtime.splitting import AnswersForValues, lacks_values, on_meta, unchanged


def advise(
    model: nn.Module,
    ranks: int,
    memory: int | None = None,
    *,
    example: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    target: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    microbatches: Iterable[int] = (),
    schedules: Iterable[str] = (),
    device: DeviceSpeed | None = None,
    link: LinkSpeed | None = None,
    optimizer: float = 2.0,
    layers: str | None = None,
    repeats: int = 5,
    group: dist.ProcessGroup | None = None,
) -> Advice:
    """Predict a step of every schedule for a model whose layers stand in a list or dict, and say which one to take.

    Forwards and backwards of each layer are measured where the model is. On the meta device, or where ``device`` is
    given, they are counted, and take what that device would: an operator as long as its FLOPs or its bytes. Sizes are
    counted in both, operator by operator; what a caching allocator adds is not among them, and outputs are taken not
    to be returned (``return_outputs=False``).

    Args:
        model: as for :func:`pp_runtime.layer_stages`.
        memory: bytes that a rank has for it; None for no bound.
        example, example_kwargs, target: of one whole batch; microbatches are cut from it along dimension 0.
        loss_fn: of the last output and the target; without it a backward begins with ones.
        microbatches: the numbers to try; by default 1, 2, 4 and 8 times the ranks, as far as the rows go.
        schedules: names; by default all.
        link: what a message between ranks takes; by default nothing.
        optimizer: its state as a multiple of the trained parameters: 2 for Adam, 1 for SGD with momentum, and 6 for
            Adam with a copy in float32 of parameters in bfloat16.
        layers: the name of their container.
        group: measure on all its ranks at once, as they will run; every rank calls this, and gets the same advice.

    Raises PipelineUsageError for what cannot be measured or cut, and where no schedule allows these counts.
    """
    if ranks < 1 or (memory is not None and memory < 1) or optimizer < 0:
        raise PipelineUsageError(
            f"a pipeline has a rank or more, each with some memory, and an optimizer no less than no state: got "
            f"{ranks} ranks, {memory} bytes, {optimizer}"
        )
    counted = device is not None
    if lacks_values(model):
        if device is None:
            raise PipelineUsageError(
                "nothing can be measured on the meta device: say what the ranks' device does a second, in "
                "device=DeviceSpeed(flops=..., bytes=...)"
            )
        model = copy.deepcopy(model).to("meta")  # with its buffers
    names = tuple(map(training_schedule, schedules)) or Setting.schedules
    setting = Setting(ranks, memory, names, link or LinkSpeed(), optimizer)
    cut = _Batch(tuple(example), dict(example_kwargs or {}), target)
    units: dict[int, list[Unit]] = {}
    with unchanged([model]), _without_values(model):
        samples = {count: cut.first_of(count, model) for count in tuple(microbatches) or cut.counts(ranks)}
        row = UnitRow(model, next(iter(samples.values())), layers, loss_fn)
        for count, sample in samples.items():
            units[count] = (
                count_units(row, sample, device)
                if counted
                else measure_units(row, sample, repeats=repeats, group=group)
            )
    return advise_for(units, setting)


class _Batch:
    """A whole batch, to be cut."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> None:
        self._args, self._kwargs, self._target = args, kwargs, target
        # Into as many as there are rows.
        self._rows = len(split_args_kwargs_into_chunks(args, kwargs, sys.maxsize)[0]) if args or kwargs else 0
        if not self._rows or self._rows == sys.maxsize:
            raise PipelineUsageError("an example is needed, of a whole batch: example=(tokens,), or example_kwargs")

    def counts(self, ranks: int) -> list[int]:
        """Of microbatches to try, where none are given."""
        return counts_to_try(self._rows, ranks)

    def first_of(self, count: int, model: nn.Module) -> Sample:
        """The first of so many microbatches, on the meta device if the model is."""
        if not 1 <= count <= self._rows:
            raise PipelineUsageError(f"{self._rows} rows do not make {count} microbatches")
        args, kwargs = split_args_kwargs_into_chunks(self._args, self._kwargs, count)
        target = None if self._target is None else split_target(self._target, count, None)[0]
        sample = args[0], kwargs[0], target
        if lacks_values(model):
            sample = tree_map_only(Tensor, on_meta, sample)
        return Sample(*sample)


def _without_values(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return AnswersForValues() if lacks_values(model) else contextlib.nullcontext()


def counts_to_try(rows: int, ranks: int) -> list[int]:
    """Of microbatches, for a batch of so many rows."""
    return [times * ranks for times in (1, 2, 4, 8) if times * ranks <= rows] or [rows]


def training_schedule(name: str) -> str:
    """The name as the catalogue has it; PipelineUsageError if there is none that trains."""
    found = schedule_name(name)
    if found is None or (found in ORDERS and ORDERS[found].forward_only):
        raise PipelineUsageError(f"there is no schedule {name!r} that trains; there are {', '.join(Setting.schedules)}")
    return found
