"""Where everything stands in a picture of timelines: a row for each rank and timeline, bars, the unit of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pp_runtime.orders import leaves
from pp_runtime.pictures.palette import COMMUNICATION, LOOKS, WAITING, legend, microbatch_label, stage_places
from pp_runtime.pictures.spans import Span, Spans

_THIN = (0.25, 0.5)  # what does not compute has the middle half of its row


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle: its row, its time, the shares of the row above it and that it takes, and the number in it."""

    row: int
    start: float
    end: float
    top: float
    height: float
    colour: str
    label: str
    span: Span


@dataclass(frozen=True)
class Layout:
    """Timelines beside each other, all from 0: each rank has one row a timeline, a plan and a run of it adjacent."""

    timelines: Mapping[str, Spans]
    rows: tuple[tuple[int, str], ...]
    length: float
    unit: str
    places: Mapping[int, float]  # of each stage among its rank's

    @staticmethod
    def of(timelines: Mapping[str, Spans], unit: str) -> Layout:
        """Seconds become milliseconds or microseconds where the longest timeline is shorter than one."""
        length = max((timeline.makespan for timeline in timelines.values()), default=0.0)
        factor, unit = _readable(length, unit)
        shown = {name: timeline.from_zero().scaled(factor) for name, timeline in timelines.items()}
        ranks = sorted({rank for timeline in shown.values() for rank in timeline.ranks})
        rows = tuple((rank, name) for rank in ranks for name in shown)
        return Layout(shown, rows, length * factor or 1.0, unit, stage_places(shown.values()))

    @property
    def row_names(self) -> list[str]:
        """The rank, and where there are several timelines their names; the rank stands before the first alone."""
        if len(self.timelines) == 1:
            return [f"rank {rank}" for rank, _ in self.rows]
        first = next(iter(self.timelines), "")
        return [f"rank {rank} {name}" if name == first else name for rank, name in self.rows]

    def legend(self) -> dict[str, tuple[str, ...]]:
        """Words, each with its colour or with its first and last shade."""
        return legend(self.timelines.values(), self.places)

    def bars(self) -> Iterator[Bar]:
        """All rectangles: what a span waited before what it did, an overlap's parts above each other."""
        row_of = {row: place for place, row in enumerate(self.rows)}
        for name, timeline in self.timelines.items():
            for span in timeline.spans:
                yield from self._bars_of(span, row_of[span.rank, name])

    def _bars_of(self, span: Span, row: int) -> Iterator[Bar]:
        start = span.start + span.waited
        if span.waited > 0:
            yield Bar(row, span.start, start, *_THIN, WAITING, "", span)
        if span.kind in COMMUNICATION:
            yield Bar(row, start, span.end, *_THIN, LOOKS[span.kind].shade(), "", span)
            return
        parts = tuple(leaves((span.parsed(),)))
        for place, part in enumerate(parts):
            colour = LOOKS[part.computation_type.value].shade(self.places.get(part.stage_index, 0))
            top, height = place / len(parts), 1 / len(parts)
            yield Bar(row, start, span.end, top, height, colour, microbatch_label(part), span)


def _readable(length: float, unit: str) -> tuple[float, str]:
    if unit != "s" or length >= 1 or length <= 0:
        return 1.0, unit
    return (1e3, "ms") if length >= 1e-3 else (1e6, "µs")
