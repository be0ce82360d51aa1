"""Spans of time, each with the action that fills it: what the pictures show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pp_runtime.orders import Action, ir

if TYPE_CHECKING:
    from typing_extensions import Self

_COMPUTE_TEXTS = tuple(kind.value for kind in ir.COMPUTE_TYPES)


@dataclass(frozen=True, slots=True)
class Span:
    """One action of one rank. Times are seconds where measured; ``waited`` is the part spent waiting for others."""

    rank: int
    action: str
    start: float
    end: float
    waited: float = 0.0

    @property
    def kind(self) -> str:
        """The text of the action's type: ``F``, ``RECV_B``, ``OVERLAP_F_B``."""
        return self.action.rpartition(")")[2].strip("0123456789")

    @property
    def worked(self) -> float:
        """The span without its waiting."""
        return self.end - self.start - self.waited

    def parsed(self) -> Action:
        """The action itself."""
        action = Action.from_str(self.action)
        if action is None:
            raise ValueError(f"A span of rank {self.rank} has no action.")
        return action


@dataclass(frozen=True)
class Spans:
    """The spans of a step on one or more ranks, in any order."""

    spans: tuple[Span, ...]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that have spans."""
        return tuple(sorted({span.rank for span in self.spans}))

    @cached_property
    def start(self) -> float:
        """When the first span starts, on the clock of the spans."""
        return min((span.start for span in self.spans), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0) - self.start

    def of_rank(self, rank: int) -> tuple[Span, ...]:
        """One rank's spans, by start."""
        return tuple(sorted((span for span in self.spans if span.rank == rank), key=lambda span: span.start))

    def busy(self, rank: int) -> float:
        """How long the rank computed: its F, I, W, B and overlaps, without what they waited."""
        return sum(span.worked for span in self.spans if span.rank == rank and span.kind in _COMPUTE_TEXTS)

    def waiting(self, rank: int) -> float:
        """How long the rank's spans waited for messages and credits."""
        return sum(span.waited for span in self.spans if span.rank == rank)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time, first start to last end, in which they did not compute."""
        total = self.makespan * len(self.ranks)
        return max(0.0, 1.0 - sum(map(self.busy, self.ranks)) / total) if total > 0 else 0.0

    def from_zero(self) -> Self:
        """The same with the first start at 0."""
        return self.shifted(-self.start)

    def shifted(self, seconds: float) -> Self:
        """The same, that much later."""
        return self._moved(1.0, seconds)

    def scaled(self, factor: float) -> Self:
        """The same in another unit."""
        return self._moved(factor, 0.0)

    def _moved(self, factor: float, later: float) -> Self:
        return type(self)(
            tuple(
                Span(s.rank, s.action, s.start * factor + later, s.end * factor + later, s.waited * factor)
                for s in self.spans
            )
        )
