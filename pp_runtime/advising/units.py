"""What the units of a model cost: measured where they are, or counted on the meta device.

A unit is the least that a stage can hold: a layer, the first with all that the model does before it; and after the
layers one more, with all that it does after them and the loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pp_runtime.advising.tally import DeviceSpeed, Tally, tallied
from pp_runtime.advising.unit_row import Pass, Sample, UnitRow
from pp_runtime.splitting import moment


@dataclass(frozen=True, slots=True)
class Unit:
    """What one unit takes for one microbatch. Times are in seconds, sizes in bytes.

    What a unit keeps is its own: neither its input nor its output is in it. The most that an action has is beyond what
    there was before it, with what it leaves.
    """

    forward: float = 0.0
    backward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    forward_call: float = 0.0
    backward_call: float = 0.0
    """What each of these takes beside for every call of one unit, or of some that follow each other."""
    kept: int = 0
    """From its forward to its backward."""
    kept_for_weight: int = 0
    """From the backward for the inputs to the one for the weights."""
    keeps_input: bool = False
    keeps_output: bool = False
    keeps_input_for_weight: bool = False
    keeps_output_for_weight: bool = False
    keeps_gradient_for_weight: bool = False
    """What came back for its output."""
    output: int = 0
    """What goes to the next unit."""
    gradient: int = 0
    """What comes back from it."""
    needs_input_gradient: bool = False
    forward_most: int = 0
    backward_most: int = 0
    input_most: int = 0
    weight_most: int = 0
    parameters: Mapping[Any, tuple[int, int]] = field(default_factory=dict)
    """By what tells them apart: the bytes of each parameter and buffer, and those of them that are trained."""

    @property
    def time(self) -> float:
        """Of a forward and a backward."""
        return self.forward + self.backward


def count_units(row: UnitRow, sample: Sample, device: DeviceSpeed | None = None) -> list[Unit]:
    """The sizes of each unit, by one microbatch that is run where the model is, and the times that a device would take.

    On the meta device nothing is computed, and attention is as of a fused kernel.
    """
    units: list[Unit] = []

    def count(index: int, given: Sample) -> Any:
        unit, output = _counted(row, index, given, device)
        units.append(unit)
        return output

    row.chain(sample, count)
    return units


def measure_units(
    row: UnitRow, sample: Sample, *, repeats: int = 5, group: dist.ProcessGroup | None = None
) -> list[Unit]:
    """The same with measured times, the medians of some runs; with a group on all its ranks at once, and their mean."""
    spans: list[dict[str, list[float]]] = [{name: [] for name in _TIMES} for _ in range(len(row) + 1)]
    for repeat in range(repeats + 1):  # the first warms up
        if group is not None:
            dist.barrier(group=group)
        for index, name, seconds in (
            *_timed(row, sample, False),
            *_timed(row, sample, True),
            *_timed_whole(row, sample),
        ):
            if repeat:
                spans[index][name].append(seconds)
    times = [[statistics.median(found[name] or [0.0]) for name in _TIMES] for found in spans]
    if group is not None:
        everyones: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyones, times, group=group)
        times = torch.tensor(everyones, dtype=torch.float64).mean(0).tolist()
    *apart, whole = times
    calls = [_call(place, apart, whole) for place in (0, 1, 1, 1)]
    return [
        replace(unit, **_net(found, calls), forward_call=calls[0], backward_call=calls[1])
        for unit, found in zip(count_units(row, sample), apart, strict=True)
    ]


def _call(place: int, apart: Sequence[Sequence[float]], whole: Sequence[float]) -> float:
    """What each of some calls takes by itself, where one for all of them takes less."""
    return max(0.0, sum(times[place] for times in apart) - whole[place]) / max(1, len(apart) - 1)


def _net(times: Sequence[float], calls: Sequence[float]) -> dict[str, Any]:
    return {name: max(0.0, time - call) for name, time, call in zip(_TIMES, times, calls, strict=True)}


_TIMES = ("forward", "backward", "backward_input", "backward_weight")


Timed = list[tuple[int, str, float]]
"""Units by their number, or by that after the last all of them; what they did, and the seconds that it took."""


def _timed(row: UnitRow, sample: Sample, split: bool) -> Timed:
    """All units' forwards, then their backwards, whole or split, each on what the others left in the caches."""
    passes: list[Pass] = []
    found: Timed = []

    def forward(index: int, given: Sample) -> Any:
        passes.append(Pass(partial(row.run, index), given))
        found.append((index, "forward", _seconds(row, passes[-1].forward)))
        passes[-1].make_gradients()
        return passes[-1].passed_on()

    row.chain(sample, forward)
    for name in ("backward_input", "backward_weight") if split else ("backward",):
        for index, one in reversed(list(enumerate(passes))):
            found.append((index, name, _seconds(row, getattr(one, name))))
    return found


def _timed_whole(row: UnitRow, sample: Sample) -> Timed:
    """A forward and a backward of all units as one."""
    one = Pass(row.run_all, sample)
    forward = _seconds(row, one.forward)
    one.make_gradients()
    return [(len(row), "forward", forward), (len(row), "backward", _seconds(row, one.backward))]


def _seconds(row: UnitRow, work: Callable[[], None]) -> float:
    begin = moment(row.devices)
    work()
    return moment(row.devices) - begin


def _counted(row: UnitRow, index: int, given: Sample, device: DeviceSpeed | None) -> tuple[Unit, Any]:
    """A unit, and what it gives to the next one."""
    keeps_input, keeps_output = _what_is_saved(row, index, given)
    tally = Tally(device)

    def most_of(work: Callable[[], None]) -> tuple[int, float]:
        before, clock = tally.mark(), tally.seconds
        with tallied(tally):
            work()
        return tally.most - before, tally.seconds - clock

    whole = Pass(partial(row.run, index), given)
    forward_most, forward = most_of(whole.forward)
    kept = tally.live - tally.size_of(tally.memory_of(whole.trained_outputs))
    whole.make_gradients()
    backward_most, backward = most_of(whole.backward)
    del whole
    left = tally.live  # by the module itself
    with tallied(tally):
        halves = Pass(partial(row.run, index), given, copied=True)
        halves.forward()
        halves.make_gradients()
    passed_on = halves.passed_on()
    output, gradient = (sum(each.nbytes for each in them) for them in (halves.outputs, halves.trained_outputs))
    needs_input_gradient = bool(halves.trained_inputs)
    came = tally.memory_of(halves.trained_inputs)
    made = tally.memory_of(halves.trained_outputs) - came
    came_back = tally.memory_of(halves.gradients)
    input_most, backward_input = most_of(halves.backward_input)
    halves.let_go()
    kept_of_others = [tally.size_of(memory) for memory in (came, made, came_back)]
    kept_for_weight = tally.live - left - sum(kept_of_others)
    weight_most, backward_weight = most_of(halves.backward_weight)
    unit = Unit(
        forward=forward,
        backward=backward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        kept=kept,
        kept_for_weight=kept_for_weight,
        keeps_input=keeps_input,
        keeps_output=keeps_output,
        keeps_input_for_weight=kept_of_others[0] > 0,
        keeps_output_for_weight=kept_of_others[1] > 0,
        keeps_gradient_for_weight=kept_of_others[2] > 0,
        output=output,
        gradient=gradient,
        needs_input_gradient=needs_input_gradient,
        forward_most=forward_most,
        backward_most=backward_most,
        input_most=input_most,
        weight_most=weight_most,
        parameters=row.parameters(index),
    )
    return unit, passed_on


def _what_is_saved(row: UnitRow, index: int, given: Sample) -> tuple[bool, bool]:
    """Whether the graph keeps a unit's input and output. Leaves gradients behind, as microbatches before do."""
    saved = set()

    def note(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage()._cdata)
        return tensor.detach()  # the tensor itself would hold the node that holds it

    one = Pass(partial(row.run, index), given)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        one.forward()
    found = [
        any(tensor.untyped_storage()._cdata in saved for tensor in tensors)
        for tensors in (one.trained_inputs, one.trained_outputs)
    ]
    one.make_gradients()
    one.backward()
    return found[0], found[1]
