"""Timelines as pictures, drawn by matplotlib: PNG, SVG or PDF."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pp_runtime.pictures.layout import Bar, Layout
from pp_runtime.pictures.palette import COMMUNICATION, INK
from pp_runtime.pictures.spans import Spans

PAGE_WIDTH = 2000  # pixels; what a screen shows whole
_WIDTHS = range(400, 60_001)  # of which matplotlib makes PNGs that have room for a row's name
_DOTS_AN_INCH = 130
_BAR = 0.86  # height of a bar, of a row of 1
_INCHES_AN_ACTION = 0.24  # room for a number of three digits
_LETTER = 0.7  # the room of a digit, of its size
_SMALLEST_LETTERS = 5.0  # points


def draw(
    path: str | Path, timelines: Mapping[str, Spans], *, title: str = "", unit: str = "s", width: int | None = None
) -> None:
    """Draw named timelines into one picture, all starting at 0; the suffix of ``path`` chooses the format.

    Each rank has one row a timeline, so a plan and a run of it stand right below each other. A bar is an action,
    coloured by its kind, the number in it is the microbatch, left out where it does not fit; a rank's later stages have
    lighter shades. ``width`` is in pixels of a PNG; without it the picture is as wide as the numbers need, but not over
    2,000. RuntimeError names the extra to install if matplotlib is missing; ValueError if there is nothing to draw or
    no such width.
    """
    if not any(timeline.spans for timeline in timelines.values()):
        raise ValueError("There is nothing to draw: the timeline has no spans.")
    if width is not None and width not in _WIDTHS:
        raise ValueError(f"A picture of {width} pixels cannot be drawn; give {_WIDTHS[0]:,} to {_WIDTHS[-1]:,}.")
    figure_class, canvas_class, patch_class = _matplotlib()
    layout = Layout.of(timelines, unit)
    left = 0.2 + 0.062 * max(map(len, layout.row_names))
    right = 0.15
    inches = _inches(layout, left + right) if width is None else width / _DOTS_AN_INCH
    row = _row_height(len(layout.rows))
    # The space above and below the rows is the same at every height: title above; time, its name and legend below.
    height = row * len(layout.rows) + 1.4
    # A thousandth of a pixel more, so that no rounding takes one away.
    figure = figure_class(figsize=(inches + 1e-3 / _DOTS_AN_INCH, height), dpi=_DOTS_AN_INCH)
    canvas_class(figure)
    axes = figure.add_axes((left / inches, 1.0 / height, 1 - (left + right) / inches, row * len(layout.rows) / height))
    points_a_unit = (inches - left - right) * 72 / layout.length
    _draw_bars(axes, layout, points_a_unit, row * 72)
    _draw_frame(axes, layout, title)
    _draw_legend(figure, patch_class, layout)
    figure.savefig(path)


def _matplotlib() -> tuple[Any, Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RuntimeError("Pictures need matplotlib: pip install 'pp_runtime[pictures]'.") from error
    return Figure, FigureCanvasAgg, Patch


def _inches(layout: Layout, margins: float) -> float:
    """What gives a typical bar room for its number, within a page."""
    widest = max(layout.length / _typical(timeline) * _INCHES_AN_ACTION for timeline in layout.timelines.values())
    return min(PAGE_WIDTH / _DOTS_AN_INCH, max(9.0, widest + margins))


def _typical(timeline: Spans) -> float:
    """How long the shorter actions that compute are; without any, endless."""
    worked = sorted(span.worked for span in timeline.spans if span.kind not in COMMUNICATION and span.worked > 0)
    return worked[len(worked) // 4] if worked else float("inf")


def _row_height(rows: int) -> float:
    """Inches: lower where there are many, down to what a row's name needs."""
    return min(0.34, max(0.14, 11.0 / rows))


def _draw_bars(axes: Any, layout: Layout, points_a_unit: float, points_a_row: float) -> None:
    """All bars of one colour and row are one drawing call, so that large timelines stay drawable."""
    pieces: dict[tuple[str, float, float], list[tuple[float, float]]] = defaultdict(list)
    labelled = []
    for bar in layout.bars():
        top = bar.row + _BAR * (bar.top - 0.5)
        pieces[bar.colour, top, _BAR * bar.height].append((bar.start, bar.end - bar.start))
        if bar.label:
            labelled.append(bar)
    typical = min(map(_typical, layout.timelines.values())) * points_a_unit
    for (colour, top, height), places in pieces.items():
        # An edge as wide as its bar would leave nothing of the colour.
        axes.broken_barh(places, (top, height), facecolor=colour, edgecolor="white", linewidth=min(0.5, typical / 12))
    _draw_labels(axes, labelled, points_a_unit, points_a_row)


def _draw_labels(axes: Any, bars: Sequence[Bar], points_a_unit: float, points_a_row: float) -> None:
    """The microbatch in the middle of each bar, as large as fits; nothing if that would be too small to read.

    Room is counted for the longest number, so that equal bars show theirs alike, 9 as large as 10, or none at all.
    """
    longest = max((len(bar.label) for bar in bars), default=1)
    for bar in bars:
        wide = (bar.end - bar.start) * points_a_unit / (_LETTER * longest)
        size = min(9.0, wide, 0.8 * _BAR * bar.height * points_a_row)
        if size < _SMALLEST_LETTERS:
            continue
        middle, height = (bar.start + bar.end) / 2, bar.row + _BAR * (bar.top + bar.height / 2 - 0.5)
        axes.text(middle, height, bar.label, ha="center", va="center_baseline", fontsize=size, color=INK, clip_on=True)


def _draw_frame(axes: Any, layout: Layout, title: str) -> None:
    rows = len(layout.rows)
    axes.set_xlim(0, layout.length)
    axes.set_ylim(rows - 0.5, -0.5)  # rank 0 on top
    axes.set_yticks(range(rows), layout.row_names, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"time ({layout.unit})" if layout.unit else "time", fontsize=8)
    for place in range(len(layout.timelines), rows, len(layout.timelines)):
        axes.axhline(place - 0.5, color="#c8ccd2", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10, loc="left")


def _draw_legend(figure: Any, patch_class: Any, layout: Layout) -> None:
    """Below the time axis, outside the rows."""
    items = layout.legend()
    figure.legend(
        handles=[patch_class(facecolor=colours[-1], label=words) for words, colours in items.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.55 / figure.get_figheight()),
        ncols=min(len(items), max(3, int(figure.get_figwidth() / 2.1))),
        fontsize=8,
        frameon=False,
    )
