"""Every schedule with every number of microbatches: how long a step would take, and what a rank would hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pp_runtime.advising.stage_costs import LinkSpeed, StageCost, activation_peak, costs_of, cut_units, loads_of_stages
from pp_runtime.advising.units import Unit
from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import ORDERS, Order, Placement, adjacent_edges, build_order, looped
from pp_runtime.planning import Plan, Wiring, aligned, auto, human, plan_memory
from pp_runtime.splitting import Partition, partition
from pp_runtime.timing import Costs, activation_peaks, simulate

STAGES_TRIED = (2, 4)
"""Stages a rank, where a schedule takes any number."""
AS_GOOD = 1.01
"""Of choices whose steps differ by less than a prediction can tell, the one with the least memory is the better."""

_CAPS_TRIED = 4


@dataclass(frozen=True, slots=True)
class RankBytes:
    """What one rank holds, in bytes, each part at its own peak."""

    parameters: int
    """With buffers."""
    gradients: int
    optimizer: int
    activations: int
    """All that forwards and backwards have at once beside the rest."""
    messages: int
    """The room for what the rank receives."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.messages


@dataclass(frozen=True, slots=True)
class Choice:
    """One schedule with one number of microbatches."""

    schedule: str
    num_stages: int
    microbatches: int
    sizes: tuple[int, ...]
    """How many layers each stage has, balanced by time; ``build_pipeline(partition=)`` takes them."""
    step_s: float
    """Seconds from when all ranks are in a step until all have ended it."""
    bubble: float
    """The share of all ranks' time in which they do not compute."""
    memory: tuple[RankBytes, ...]
    """Of each rank."""
    costs: Costs = field(repr=False)
    """Of its stages, in seconds; ``ScheduleAuto`` takes them."""
    memory_cap: int | None = None
    """``ScheduleAuto``'s, where it needs one to fit."""

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(rank.total for rank in self.memory)


@dataclass(frozen=True)
class Advice:
    """All choices that a setting allows, those that fit first and then by their time."""

    choices: tuple[Choice, ...]
    refused: Mapping[str, str]
    """Why a schedule is not among them."""
    memory: int | None
    """Bytes that a rank has."""
    in_seconds: bool = True
    """Whether times are seconds; or only to be compared with each other."""

    def fits(self, choice: Choice) -> bool:
        return self.memory is None or choice.peak <= self.memory

    @property
    def best(self) -> Choice | None:
        """The shortest that fits, or of those as good the one with the least memory; None where nothing fits."""
        fitting = [choice for choice in self.choices if self.fits(choice)]
        if not fitting:
            return None
        shortest = min(choice.step_s for choice in fitting)
        return min((choice for choice in fitting if choice.step_s <= AS_GOOD * shortest), key=lambda each: each.peak)

    def table(self) -> str:
        """The choices as aligned text, then what to take."""
        heads = ["schedule", "stages", "microbatches", "step", "bubble", "fullest rank", "activations", "messages", ""]
        lines = [*aligned([heads, *map(self._cells, self.choices)]), "", self.verdict()]
        return "\n".join([*lines, *(f"{name} is left out: {reason}" for name, reason in self.refused.items())])

    def verdict(self) -> str:
        """What to take, in a sentence."""
        best = self.best
        if best is None:
            least = min(self.choices, key=lambda choice: choice.peak)
            return (
                f"Nothing fits into {human(self.memory or 0)}: the least is {self._described(least)}. Take more ranks, "
                "smaller microbatches, recomputed activations, or an optimizer with less state."
            )
        cap = "" if best.memory_cap is None else f", memory_cap={best.memory_cap}"
        return f"Take {self._described(best)}; partition={best.sizes}{cap}."

    def _described(self, choice: Choice) -> str:
        return (
            f"{choice.schedule} with {choice.microbatches} microbatches: {self._time(choice)} a step, bubble "
            f"{choice.bubble:.1%}, {human(choice.peak)} on the fullest rank"
        )

    def _cells(self, choice: Choice) -> list[str]:
        fullest = max(choice.memory, key=lambda rank: rank.total)
        return [
            choice.schedule,
            str(choice.num_stages),
            str(choice.microbatches),
            self._time(choice),
            f"{choice.bubble:.1%}",
            human(choice.peak),
            human(fullest.activations),
            human(fullest.messages),
            "" if self.fits(choice) else "does not fit",
        ]

    def _time(self, choice: Choice) -> str:
        if not self.in_seconds:
            return f"{choice.step_s / min(each.step_s for each in self.choices):.3f}"
        return f"{choice.step_s:.4g} s" if choice.step_s >= 1 else f"{1e3 * choice.step_s:.4g} ms"


@dataclass(frozen=True)
class Setting:
    """What all choices have in common. ``optimizer`` is its state as a multiple of the trained parameters."""

    ranks: int
    memory: int | None = None
    schedules: Sequence[str] = tuple(name for name, spec in ORDERS.items() if not spec.forward_only) + ("Auto",)
    link: LinkSpeed = LinkSpeed()
    optimizer: float = 2.0


def advise_for(units: Mapping[int, Sequence[Unit]], setting: Setting, *, in_seconds: bool = True) -> Advice:
    """For a model whose units cost this, by the number of microbatches that a batch is cut into."""
    choices: list[Choice] = []
    refused: dict[str, str] = {}
    for microbatches, row in units.items():
        cuts: dict[int, tuple[Partition, list[StageCost]]] = {}
        for name in setting.schedules:
            for per_rank in _stages_a_rank(name):
                stages = setting.ranks * per_rank
                try:
                    if stages > len(row):
                        raise ValueError(f"{len(row) - 1} layers do not make {stages} stages")
                    if stages not in cuts:
                        cut = partition([unit.time for unit in row], stages)
                        cuts[stages] = cut, cut_units(row, cut)
                    choices.append(_Maker(setting, microbatches, *cuts[stages]).make(name))
                except ValueError as error:
                    refused.setdefault(name, str(error))
    found = {choice.schedule for choice in choices}
    if not choices:
        raise PipelineUsageError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    left_out = {name: reason for name, reason in refused.items() if name not in found}
    advice = Advice(tuple(choices), left_out, setting.memory, in_seconds)
    choices.sort(key=lambda each: (not advice.fits(each), each.step_s, each.peak))
    return replace(advice, choices=tuple(choices))


def _stages_a_rank(name: str) -> Sequence[int]:
    if name == "Auto":
        return (1, 2)
    return ORDERS[name].stages_per_rank_allowed or STAGES_TRIED


class _Maker:
    """Choices of one cut and one number of microbatches."""

    def __init__(self, setting: Setting, microbatches: int, cut: Partition, stages: list[StageCost]) -> None:
        self._setting, self._microbatches = setting, microbatches
        self._stages = stages
        # The last unit is no layer.
        self._sizes = (*cut[:-1], cut[-1] - 1)
        self._costs = costs_of(stages, setting.link)

    def make(self, name: str) -> Choice:
        """Of one schedule; ValueError where it does not allow these counts."""
        if name != "Auto":
            return self._choice(name, *build_order(name, self._setting.ranks, len(self._stages), self._microbatches))
        return self._auto()

    def _auto(self) -> Choice:
        """The order that a search finds; under ever lower caps while it does not fit."""
        ranks, count, memory = self._setting.ranks, len(self._stages), self._setting.memory
        placement = looped(ranks, count)
        cap: int | None = None
        for _ in range(_CAPS_TRIED):
            order = auto(ranks, count, self._microbatches, self._costs, cap, placement)
            choice = self._choice("Auto", order, placement, cap)
            if memory is None or choice.peak <= memory:
                break
            fullest = max(choice.memory, key=lambda rank: rank.total)
            share = (memory - fullest.total) / fullest.activations
            forwards = max(activation_peaks(order).values())
            cap = max(count // ranks, min(int(forwards) - 1, int(forwards * (1 + share))))
        return choice

    def _choice(self, name: str, order: Order, placement: Placement, cap: int | None = None) -> Choice:
        played = simulate(order, self._costs, placement=placement)
        return Choice(
            schedule=name,
            num_stages=len(self._stages),
            microbatches=self._microbatches,
            sizes=self._sizes,
            step_s=played.makespan,
            bubble=played.bubble,
            memory=tuple(self._memory(order, placement)),
            costs=self._costs,
            memory_cap=cap,
        )

    def _memory(self, order: Order, placement: Placement) -> Iterator[RankBytes]:
        plan = Plan(order, placement, self._microbatches, Wiring(adjacent_edges(len(placement)), {}))
        report = plan_memory(plan, loads_of_stages(self._stages))
        for rank, row in zip(sorted(order), report.ranks, strict=True):
            held = [stage for stage, holder in zip(self._stages, placement, strict=True) if holder == rank]
            sizes = {key: size for stage in held for key, size in stage.parameters.items()}
            trained = sum(size for _, size in sizes.values())
            yield RankBytes(
                parameters=sum(size for size, _ in sizes.values()),
                gradients=trained,
                optimizer=int(self._setting.optimizer * trained),
                activations=activation_peak(order[rank], self._stages, placement),
                messages=row.activations.bytes + row.gradients.bytes,
            )
