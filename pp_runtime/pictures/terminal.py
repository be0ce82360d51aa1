"""A timeline in the terminal: one row a rank, time to the right."""

from __future__ import annotations

from statistics import median

from pp_runtime.pictures.palette import COMMUNICATION, LOOKS, action_label, stage_places
from pp_runtime.pictures.spans import Span, Spans


def text_picture(timeline: Spans, width: int = 100, colour: bool = False) -> str:
    """The timeline in lines of at most ``width`` characters, cut into blocks of time that stand below each other.

    A cell is as wide as its action is long, just wide enough for the text of a typical one; sends and receives are
    left out. Without colour an action longer than its text goes on in dashes.
    """
    shown = [span for span in timeline.from_zero().spans if span.kind not in COMMUNICATION and span.end > span.start]
    if not shown:
        return "nothing runs"
    several = max(stage_places([timeline]).values()) > 0
    scale = _characters_a_unit(shown, several)
    rows: dict[int, list[tuple[int, int, Span]]] = {rank: [] for rank in timeline.ranks}
    for span in sorted(shown, key=lambda span: span.start):
        rows[span.rank].append((round(span.start * scale), round(span.end * scale), span))
    heads = {rank: f"rank {rank} " for rank in rows}
    head_width = max(map(len, heads.values()))
    total = max(end for row in rows.values() for _, end, _ in row)
    cell = max(1, round(scale * min(span.end - span.start for span in shown)))
    block = max(10, (width - head_width) // cell * cell)
    lines = []
    for first in range(0, total, block):
        if total > block:
            lines.append(f"{'from':>{head_width - 1}} {first / scale:.4g}")
        for rank, row in rows.items():
            cells = _cells(row, first, first + block, several, colour)
            lines.append(f"{heads[rank]:<{head_width}}{cells}".rstrip())
    lines.append(_legend(shown, colour))
    return "\n".join(lines)


def _characters_a_unit(spans: list[Span], several: bool) -> float:
    needs = [(len(action_label(span, several)) + 1) / (span.end - span.start) for span in spans]
    return min(max(needs), 2 * median(needs))


def _cells(row: list[tuple[int, int, Span]], first: int, last: int, several: bool, colour: bool) -> str:
    """The characters of one rank between two columns."""
    text = ""
    column = first
    for start, end, span in row:
        start, end = max(start, first), min(end, last)
        if end <= start or end <= column:
            continue
        start = max(start, column)
        text += " " * (start - column) + _cell(action_label(span, several), end - start, span.kind, colour)
        column = end
    return text


def _cell(label: str, width: int, kind: str, colour: bool) -> str:
    label = label if len(label) <= width else ""
    if colour:
        body = f"{label:^{width - 1}}"[:width] if width > 1 else label or " "
        return f"\x1b[48;5;{LOOKS[kind].terminal}m\x1b[30m{body}\x1b[0m" + " " * (width - len(body))
    body = f"{label:-<{width - 1}}" if width > 1 else label or "-"
    return f"{body:<{width}}"


def _legend(spans: list[Span], colour: bool) -> str:
    kinds = [kind for kind in LOOKS if any(span.kind == kind for span in spans)]
    if not colour:
        return ", ".join(LOOKS[kind].words for kind in kinds)
    return " ".join(f"\x1b[48;5;{LOOKS[kind].terminal}m\x1b[30m {LOOKS[kind].words} \x1b[0m" for kind in kinds)
