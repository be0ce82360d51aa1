"""Layers to stages: the contiguous partition whose largest part is smallest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import build_order
from pp_runtime.timing import Costs, Simulation, simulate


class Partition(tuple[int, ...]):
    """The sizes of the parts, in order: how many layers each stage has. Made by :func:`partition`."""

    loads: tuple[float, ...]
    """What each part costs, ``extra`` included, over its ``worth``."""

    def __new__(cls, sizes: Sequence[int], loads: Sequence[float]) -> Partition:
        made = super().__new__(cls, sizes)
        made.loads = tuple(loads)
        return made

    def __getnewargs__(self) -> tuple[Sequence[int], Sequence[float]]:  # so that ranks can send one another their cut
        return tuple(self), self.loads

    @property
    def ranges(self) -> tuple[range, ...]:
        """The numbers of each part's layers."""
        ends = list(accumulate(self))
        return tuple(range(end - size, end) for size, end in zip(self, ends, strict=True))

    @property
    def balance(self) -> float:
        """The mean load over the largest: 1 where all are equal, and the share of the time that stages work at best."""
        largest = max(self.loads)
        return 1.0 if largest == 0 else sum(self.loads) / len(self.loads) / largest

    def simulate(self, schedule: str, ranks: int, microbatches: int) -> Simulation:
        """A step of a named schedule in which a stage's F, I and W each take its load; ``bubble`` is what remains.

        The parts are the schedule's stages. Raises ValueError for a count of stages that the schedule does not allow.
        """
        order, placement = build_order(schedule, ranks, len(self), microbatches)
        return simulate(order, Costs(self.loads, self.loads, self.loads), placement=placement)

    def __repr__(self) -> str:
        return f"Partition({', '.join(map(str, self))}; balance {self.balance:.3f})"


def partition(
    costs: Sequence[float],
    parts: int,
    *,
    extra: Mapping[int, float] | None = None,
    worth: Sequence[float] | None = None,
    begins: Sequence[int] = (),
    least: int = 1,
) -> Partition:
    """Cut a row of layers into ``parts`` contiguous parts whose largest load is the smallest that there is.

    Of the partitions with that largest load it is the most even one (the least sum of squares), with the lighter parts
    first, where a pipeline holds the most activations.

    Args:
        costs: of each layer, in any unit: seconds, FLOPs, parameters, bytes (:func:`pp_runtime.layer_costs`).
        extra: what a part costs beside its layers, by its number, -1 for the last: embeddings, head, loss.
        worth: of each part: a part of worth 2 is as loaded by a cost of 2 as one of worth 1 by 1, as on a faster rank.
        begins: numbers of layers that must be the first of a part.
        least: how few layers a part may have; 0 lets an extra stand alone.

    Exact: dynamic programming over parts and layers. Raises PipelineUsageError for costs that are no numbers of at
    least 0, and where no such partition exists.
    """
    return _Problem(list(costs), parts, dict(extra or {}), worth, begins, least).solve()


class _Problem:
    def __init__(
        self,
        costs: list[float],
        parts: int,
        extra: dict[int, float],
        worth: Sequence[float] | None,
        begins: Sequence[int],
        least: int,
    ) -> None:
        self._count, self._parts, self._least = len(costs), parts, least
        if parts < 1 or least < 0 or parts * least > self._count:
            raise PipelineUsageError(
                f"{self._count} layers do not make {parts} parts of at least {least}: take fewer stages, or a model "
                "with more layers"
            )
        _check_numbers("costs", costs)
        self._before = [0.0, *accumulate(costs)]
        wrong = [part for part in extra if not -parts <= part < parts]
        if wrong:
            raise PipelineUsageError(f"extra names part {wrong[0]}, and there are {parts}: 0 to {parts - 1}, or -1")
        self._extra = [0.0] * parts
        for part, cost in extra.items():
            self._extra[part] += cost
        _check_numbers("extra", self._extra)
        self._worth = [1.0] * parts if worth is None else list(worth)
        _check_numbers("worth", self._worth)
        if len(self._worth) != parts or not all(self._worth):
            raise PipelineUsageError(f"worth needs a number above 0 for each of {parts} parts, got {self._worth}")
        wrong = [layer for layer in begins if not 0 <= layer < self._count]
        if wrong:
            raise PipelineUsageError(f"begins names layer {wrong[0]}, and there are {self._count}, from 0 on")
        # The earliest layer that a part may begin at, by the layer that it ends before.
        self._earliest = [max((layer for layer in begins if layer < end), default=0) for end in range(self._count + 1)]

    def solve(self) -> Partition:
        largest = self._best(max, math.inf)[0]
        if largest == math.inf:
            raise PipelineUsageError(
                f"{self._parts} parts cannot begin at each of the layers that begins names: take more stages"
            )
        ends = self._best(_add_square, largest)[1]
        sizes = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
        return Partition(sizes, [self._load(part, ends[part], ends[part + 1]) for part in range(self._parts)])

    def _best(self, joined: Callable[[float, float], float], largest: float) -> tuple[float, list[int]]:
        """The least value of a partition without a load above ``largest``, and where its parts end, from 0 on.

        A partition's value is its loads' joined from the first to the last; it is infinite where there is none.
        """
        values = [0.0] + [math.inf] * self._count
        begins: list[list[int]] = []
        for part in range(self._parts):
            left = (self._parts - 1 - part) * self._least
            now, chosen = [math.inf] * (self._count + 1), [0] * (self._count + 1)
            for end in range(self._count + 1 - left):
                for begin in range(end - self._least, self._earliest[end] - 1, -1):
                    load = self._load(part, begin, end)
                    if load > largest or joined(0.0, load) > now[end]:
                        break  # and more so for parts that begin before
                    value = joined(values[begin], load)
                    # The last of equals, which is the longest: the parts before it are the lighter ones.
                    if value <= now[end] and value < math.inf:
                        now[end], chosen[end] = value, begin
            values = now
            begins.append(chosen)
        ends = [self._count]
        for chosen in reversed(begins):
            ends.append(chosen[ends[-1]])
        return values[-1], ends[::-1]

    def _load(self, part: int, begin: int, end: int) -> float:
        return (self._before[end] - self._before[begin] + self._extra[part]) / self._worth[part]


def _add_square(so_far: float, load: float) -> float:
    return so_far + load * load


def _check_numbers(name: str, numbers: Sequence[float]) -> None:
    for place, number in enumerate(numbers):
        if not (isinstance(number, (int, float)) and math.isfinite(number) and number >= 0):
            raise PipelineUsageError(f"{name} are numbers of at least 0, and number {place} is {number!r}")
