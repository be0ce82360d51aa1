"""Timelines as pictures, drawn by matplotlib: PNG, SVG or PDF."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pp_runtime.pictures.palette import COMMUNICATION, LOOKS, WAITING, microbatch_label, stage_places
from pp_runtime.pictures.spans import Span, Spans

_BAR = 0.86  # height of a bar, of a row of 1
_INCHES_AN_ACTION = 0.24
_DOTS_AN_INCH = 130


def draw(path: str | Path, timelines: Mapping[str, Spans], *, title: str = "", unit: str = "s") -> None:
    """Draw named timelines into one picture, all starting at 0; the suffix of ``path`` chooses the format.

    Each rank has one row a timeline, so a plan and a run of it stand right below each other. A bar is an action,
    coloured by its kind, the number in it is the microbatch; a rank's later stages have lighter shades. RuntimeError
    names the extra to install if matplotlib is missing.
    """
    shown = {name: timeline.from_zero() for name, timeline in timelines.items()}
    if not any(timeline.spans for timeline in shown.values()):
        raise ValueError("There is nothing to draw: the timeline has no spans.")
    figure_class, canvas_class, patch_class = _matplotlib()
    ranks = sorted({rank for timeline in shown.values() for rank in timeline.ranks})
    rows = {(rank, name): place for place, (rank, name) in enumerate((r, n) for r in ranks for n in shown)}
    length = max(timeline.makespan for timeline in shown.values()) or 1.0
    width = _width(shown)
    # The space above and below the rows is the same at every height: title above; time, its name and legend below.
    height = 0.34 * len(rows) + 1.4
    figure = figure_class(figsize=(width, height), dpi=_DOTS_AN_INCH)
    canvas_class(figure)
    axes = figure.add_axes((0.95 / width, 1.0 / height, 1 - 1.1 / width, 0.34 * len(rows) / height))
    places = stage_places(shown.values())
    points_a_unit = (width - 1.1) * 72 / length
    for name, timeline in shown.items():
        _draw_timeline(axes, timeline, {rank: rows[rank, name] for rank in timeline.ranks}, places, points_a_unit)
    _draw_frame(axes, rows, len(shown), length, unit, title)
    _draw_legend(figure, patch_class, shown, places)
    figure.savefig(path)


def _matplotlib() -> tuple[Any, Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RuntimeError("Pictures need matplotlib: pip install 'pp_runtime[pictures]'.") from error
    return Figure, FigureCanvasAgg, Patch


def _width(timelines: Mapping[str, Spans]) -> float:
    """Inches that give a typical bar room for its number, within what viewers can show."""
    widest = 0.0
    for timeline in timelines.values():
        durations = sorted(span.worked for span in timeline.spans if span.kind not in COMMUNICATION and span.worked > 0)
        if durations:
            widest = max(widest, timeline.makespan / durations[len(durations) // 4] * _INCHES_AN_ACTION)
    return min(60.0, max(9.0, widest + 1.1))


def _draw_timeline(
    axes: Any, timeline: Spans, row_of: Mapping[int, int], places: Mapping[int, float], points_a_unit: float
) -> None:
    """All bars of one colour and row are one drawing call, so that large timelines stay drawable."""
    bars: dict[tuple[str, float, float], list[tuple[float, float]]] = defaultdict(list)
    for span in timeline.spans:
        row = row_of[span.rank]
        if span.waited > 0:
            bars[WAITING, row - _BAR / 4, _BAR / 2].append((span.start, span.waited))
        start = span.start + span.waited
        if span.kind in COMMUNICATION:
            bars[LOOKS[span.kind].shade(), row - _BAR / 4, _BAR / 2].append((start, span.worked))
            continue
        parts = span.parsed().sub_actions or (span.parsed(),)
        height = _BAR / len(parts)
        for place, part in enumerate(parts):
            look = LOOKS[part.computation_type.value]
            colour = look.shade(places.get(part.stage_index, 0))
            bars[colour, row - _BAR / 2 + place * height, height].append((start, span.worked))
        _draw_label(axes, span, row, points_a_unit)
    for (colour, bottom, height), pieces in bars.items():
        axes.broken_barh(pieces, (bottom, height), facecolor=colour, edgecolor="white", linewidth=0.5)


def _draw_label(axes: Any, span: Span, row: int, points_a_unit: float) -> None:
    """The microbatch in the middle of the bar, as large as fits; nothing if that would be too small to read."""
    labels = microbatch_label(span).split("/")
    room = span.worked * points_a_unit
    size = min(9.0 if len(labels) == 1 else 7.0, room / (0.68 * max(map(len, labels)) or 1.0))
    if size < 4.5:
        return
    middle = span.start + span.waited + span.worked / 2
    for place, label in enumerate(labels):
        height = row - _BAR / 2 + (place + 0.5) * _BAR / len(labels)
        axes.text(
            middle, height, label, ha="center", va="center_baseline", fontsize=size, color="#16202b", clip_on=True
        )


def _draw_frame(
    axes: Any, rows: Mapping[tuple[int, str], int], num_timelines: int, length: float, unit: str, title: str
) -> None:
    axes.set_xlim(0, length)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # rank 0 on top
    names = [f"rank {rank}" if num_timelines == 1 else f"{rank} {name}" for rank, name in rows]
    axes.set_yticks(list(rows.values()), names, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(f"time ({unit})" if unit else "time", fontsize=8)
    for place in range(num_timelines, len(rows), num_timelines):
        axes.axhline(place - 0.5, color="#c8ccd2", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10, loc="left")


def _draw_legend(figure: Any, patch_class: Any, timelines: Mapping[str, Spans], places: Mapping[int, float]) -> None:
    """Below the time axis, outside the rows."""
    spans = [span for timeline in timelines.values() for span in timeline.spans]
    kinds = {part.computation_type.value for span in spans for part in span.parsed().sub_actions or (span.parsed(),)}
    patches = {LOOKS[kind].words: LOOKS[kind].shade() for kind in LOOKS if kind in kinds}
    if max(places.values(), default=0) > 0:
        patches["lighter: a rank's later stages"] = LOOKS["F"].shade(1.0)
    if any(span.waited > 0 for span in spans):
        patches["waiting for a message"] = WAITING
    figure.legend(
        handles=[patch_class(facecolor=colour, label=words) for words, colour in patches.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.55 / figure.get_figheight()),
        ncols=min(len(patches), max(3, int(figure.get_figwidth() / 2.1))),
        fontsize=8,
        frameon=False,
    )
