"""What ran when, planned or measured: spans of time with the action that filled each."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pp_runtime.orders import leaves
from pp_runtime.pictures import Span, Spans, draw, read_chrome, write_chrome
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.measured import measured_costs


@dataclass(frozen=True)
class Timeline(Spans):
    """What the ranks did in a step."""

    @staticmethod
    def from_records(rank: int, records: Iterable[tuple[str, int, int, int]]) -> Timeline:
        """From the executor's ``(action, start_ns, end_ns, waited_ns)``, taken from the host's monotonic clock."""
        return Timeline(
            tuple(Span(rank, action, start * 1e-9, end * 1e-9, waited * 1e-9) for action, start, end, waited in records)
        )

    @staticmethod
    def from_chrome(path: str | Path) -> Timeline:
        """The (first) timeline of a file that :meth:`to_chrome` wrote."""
        return Timeline(read_chrome(path).spans)

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

    @property
    def num_stages(self) -> int:
        """The stages of the model, as far as the timeline shows them."""
        return 1 + max((part.stage_index for span in self.spans for part in leaves((span.parsed(),))), default=-1)

    def costs(self) -> Costs:
        """Median times of the actions, by stage, to simulate other schedules with (:mod:`.measured`)."""
        return measured_costs(self)

    def to_chrome(self, path: str | Path) -> None:
        """Write JSON that ui.perfetto.dev and chrome://tracing open."""
        write_chrome(path, {"measured": self})

    def save_png(self, path: str | Path, *, width: int | None = None) -> None:
        """Draw the timeline (needs matplotlib); the suffix of the path chooses PNG, SVG or PDF.

        ``width`` is in pixels; without it, what the microbatches' numbers need up to 2,000. Numbers that do not fit are
        left out.
        """
        draw(path, {"measured": self}, width=width)


def _host() -> str:
    """One text for all processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
