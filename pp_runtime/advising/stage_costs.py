"""Units to stages: what the actions of each stage take, and what a rank holds at its fullest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest

from pp_runtime.advising.units import Unit
from pp_runtime.orders import Action, Edge, Placement, ir, leaves
from pp_runtime.planning import Load
from pp_runtime.timing import Costs


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What a message takes: seconds before its first byte, and bytes a second."""

    latency: float = 0.0
    bandwidth: float = float("inf")

    def seconds(self, size: int) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage's, for one microbatch, in seconds and bytes; with ``Unit``'s meanings."""

    forward: float
    backward: float
    backward_input: float
    backward_weight: float
    kept: int
    kept_for_weight: int
    keeps_input: bool
    keeps_input_for_weight: bool
    keeps_output: bool
    keeps_gradient_for_weight: bool
    output: int
    gradient: int
    forward_most: int
    backward_most: int
    input_most: int
    weight_most: int
    parameters: Mapping[object, tuple[int, int]]

    @staticmethod
    def of(units: Sequence[Unit]) -> StageCost:
        """Of units that follow each other."""
        splits = units[0].needs_input_gradient  # or all of the backward is for weights
        # What is passed on and trained; the rest, such as a mask, is made once.
        pairs = list(zip_longest(units, units[1:], fillvalue=_NOTHING))
        kept = [one.kept + one.gradient * (one.keeps_output or after.keeps_input) for one, after in pairs]
        halves = [
            one.kept_for_weight
            + one.gradient * (one.keeps_output_for_weight or after.keeps_input_for_weight)
            + one.gradient * (one.keeps_gradient_for_weight and after is not _NOTHING)
            for one, after in pairs
        ]
        if not splits:
            halves = kept
        call = units[0].backward_call
        backward = sum(unit.backward for unit in units) + call
        backward_most = _most_freeing(units, kept)
        return StageCost(
            forward=sum(unit.forward for unit in units) + units[0].forward_call,
            backward=backward,
            backward_input=sum(unit.backward_input for unit in units) + call if splits else 0.0,
            backward_weight=sum(unit.backward_weight for unit in units) + call if splits else backward,
            kept=sum(kept),
            kept_for_weight=sum(halves),
            keeps_input=units[0].keeps_input,
            keeps_input_for_weight=units[0].keeps_input_for_weight if splits else units[0].keeps_input,
            keeps_output=units[-1].keeps_output,
            keeps_gradient_for_weight=splits and units[-1].keeps_gradient_for_weight,
            output=units[-1].output,
            gradient=units[-1].gradient,
            forward_most=max(
                before + unit.forward_most for before, unit in zip((0, *accumulate(kept)), units, strict=False)
            ),
            backward_most=backward_most,
            input_most=_most_halving(units, kept, halves) if splits else 0,
            weight_most=max(unit.weight_most for unit in units) if splits else backward_most,
            parameters={key: sizes for unit in units for key, sizes in unit.parameters.items()},
        )


_NOTHING = Unit()


def _most_freeing(units: Sequence[Unit], kept: Sequence[int]) -> int:
    freed, most = 0, 0
    for unit, own in zip(reversed(units), reversed(kept), strict=True):
        most = max(most, unit.backward_most - freed)
        freed += own
    return most


def _most_halving(units: Sequence[Unit], kept: Sequence[int], halves: Sequence[int]) -> int:
    changed, most = 0, 0
    for unit, before, after in zip(reversed(units), reversed(kept), reversed(halves), strict=True):
        most = max(most, unit.input_most + changed)
        changed += after - before
    return most


def cut_units(units: Sequence[Unit], sizes: Iterable[int]) -> list[StageCost]:
    """The stages that hold so many units each."""
    ends = list(accumulate(sizes))
    return [StageCost.of(units[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def costs_of(stages: Sequence[StageCost], link: LinkSpeed) -> Costs:
    """For the simulation."""
    return Costs(
        forward=tuple(stage.forward for stage in stages),
        backward_input=tuple(stage.backward_input for stage in stages),
        backward_weight=tuple(stage.backward_weight for stage in stages),
        full_backward=tuple(stage.backward for stage in stages),
        transfer=tuple(link.seconds(stage.output) for stage in stages),
    )


def loads_of_stages(stages: Sequence[StageCost]) -> dict[Edge, Load]:
    """What goes over the edges of a chain."""
    return {Edge(i, i + 1): Load(stage.output, stage.gradient) for i, stage in enumerate(stages[:-1])}


def activation_peak(actions: Iterable[Action], stages: Sequence[StageCost], placement: Placement) -> int:
    """The most bytes that a rank's actions have at once beside parameters, gradients and messages."""
    local = [rank == next_rank for rank, next_rank in pairwise(placement)]
    # What a stage of the same rank handed over, or back, lies in no message's room.
    handed = [
        0,
        *(
            before.gradient * (here and stage.keeps_input and not before.keeps_output)
            for before, stage, here in zip(stages, stages[1:], local, strict=False)
        ),
    ]
    for_weight = [
        stage.kept_for_weight
        + own * stage.keeps_input_for_weight
        + stage.gradient * (here and stage.keeps_gradient_for_weight)
        for stage, own, here in zip(stages, handed, [*local, False], strict=True)
    ]
    held = most = 0
    for i, kind, _, _ in leaves(actions):
        stage = stages[i]
        whole = stage.kept + handed[i]
        if kind is ir.FORWARD:
            most = max(most, held + handed[i] + stage.forward_most)
            held += whole
        elif kind is ir.FULL_BACKWARD:
            most = max(most, held + stage.backward_most)
            held -= whole
        elif kind is ir.BACKWARD_INPUT:
            most = max(most, held + stage.input_most)
            held += for_weight[i] - whole
        elif kind is ir.BACKWARD_WEIGHT:
            most = max(most, held + stage.weight_most)
            held -= for_weight[i]
    return most
