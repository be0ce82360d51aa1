"""What ran when, planned or measured: spans of time with the action that filled each."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ir import COMPUTE_TYPES, Action

if TYPE_CHECKING:
    from .costs import Costs

_COMPUTE_TEXTS = tuple(kind.value for kind in COMPUTE_TYPES)


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
class Timeline:
    """The spans of a step on one or more ranks, in any order."""

    spans: tuple[Span, ...]

    @staticmethod
    def from_records(rank: int, records: Iterable[tuple[str, int, int, int]]) -> Timeline:
        """From the executor's ``(action, start_ns, end_ns, waited_ns)``, taken from the host's monotonic clock."""
        return Timeline(
            tuple(Span(rank, action, start * 1e-9, end * 1e-9, waited * 1e-9) for action, start, end, waited in records)
        )

    @staticmethod
    def from_chrome(path: str | Path) -> Timeline:
        """The (first) timeline of a file that :meth:`to_chrome` wrote."""
        from .traces import read_chrome

        return read_chrome(path)

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

    def from_zero(self) -> Timeline:
        """The same with the first start at 0."""
        return self.shifted(-self.start)

    def shifted(self, seconds: float) -> Timeline:
        """The same, that much later."""
        return Timeline(
            tuple(
                Span(span.rank, span.action, span.start + seconds, span.end + seconds, span.waited)
                for span in self.spans
            )
        )

    def gather(self, group: Any = None) -> Timeline:
        """All ranks' timelines as one, on every rank; a collective call on the process group.

        Ranks of one host share its clock. Other hosts' clocks are shifted onto rank 0's by a moment that all ranks
        saw, the end of a barrier, so between hosts times are right to about a barrier's skew.
        """
        import torch.distributed as dist

        size = dist.get_world_size(group)
        moments: list[Any] = [None] * size
        parts: list[Any] = [None] * size
        dist.barrier(group=group)
        dist.all_gather_object(moments, (_host(), time.monotonic()), group=group)
        dist.all_gather_object(parts, self, group=group)
        first_of_host: dict[str, float] = {}
        for host, moment in moments:
            first_of_host[host] = min(moment, first_of_host.get(host, moment))
        reference = first_of_host[moments[0][0]]
        merged: list[Span] = []
        for (host, _), part in zip(moments, parts, strict=True):
            shift = reference - first_of_host[host]
            merged.extend((part if shift == 0.0 else part.shifted(shift)).spans)
        return Timeline(tuple(merged))

    def costs(self) -> Costs:
        """Median times of the actions, by stage, to simulate other schedules with (:mod:`pp_runtime.measured`)."""
        from .measured import measured_costs

        return measured_costs(self)

    def to_chrome(self, path: str | Path) -> None:
        """Write JSON that ui.perfetto.dev and chrome://tracing open."""
        from .traces import write_chrome

        write_chrome(path, {"measured": self})

    def save_png(self, path: str | Path) -> None:
        """Draw the timeline (needs matplotlib); the suffix of the path chooses PNG, SVG or PDF."""
        from .visualize import draw

        draw(path, {"measured": self})


def _host() -> str:
    """One text for all processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
