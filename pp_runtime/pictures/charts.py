"""Small charts as SVG, for pages: lines over steps and stacked columns, with a title under the pointer."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

CHART_STYLE = """svg.chart{width:100%;max-width:560px;height:auto;font:12px system-ui,sans-serif;overflow:visible}
svg.chart text{fill:var(--quiet)}svg.chart .head{fill:var(--ink);font-weight:600}
svg.chart .grid{stroke:var(--line);stroke-width:1}svg.chart .line{fill:none;stroke:var(--accent);stroke-width:1.5}
svg.chart .dot{fill:var(--accent)}svg.chart .at{fill:transparent}svg.chart .at:hover{fill:var(--line);fill-opacity:.6}
:root{--accent:#1f6fb0}@media(prefers-color-scheme:dark){:root{--accent:#6cb0e6}}
"""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 190, 62, 10, 28, 24
_MOST_PLACES = 280  # that have a title under the pointer
_OUTLIER = 3.0  # times the median; a first step that compiles is not to flatten all others


def line_chart(
    title: str, steps: Sequence[int], values: Sequence[float | None], show: Callable[[float], str], *, from_zero: bool
) -> str:
    """One value over steps, those that are known; "" where none is. ``show`` gives a value's text, with its unit."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if not known:
        return ""
    numbers = [value for _, value in known]
    low, high = (0.0 if from_zero else min(numbers)), max(numbers)
    note = ""
    if from_zero and high > _OUTLIER * (middle := median(numbers)) > 0:
        beyond = [step for step, value in known if value > _OUTLIER * middle]
        high = max(value for value in numbers if value <= _OUTLIER * middle)
        note = f"{len(beyond)} beyond the scale, at most {show(max(numbers))}, step {_step_of(known)}"
    frame = _Frame(known[0][0], known[-1][0], low, high)
    points = [(frame.x(step), frame.y(min(value, frame.high))) for step, value in known]
    line = (
        f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
        if len(points) > 1
        else f'<circle class="dot" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>'
    )
    label = f"{title}: {show(numbers[-1])} at step {known[-1][0]}, from {show(min(numbers))} to {show(max(numbers))}"
    return _svg(label, title, note, frame.grid(show) + line + _titles(known, points, show))


def share_chart(title: str, parts: Mapping[str, tuple[str, Sequence[float]]]) -> str:
    """For each rank a column of shares from 0 to 1, one a part: its words, with its colour and its value a rank."""
    count = len(next(iter(parts.values()))[1])
    frame = _Frame(0, count, 0.0, 1.0)
    wide = (_WIDTH - _LEFT - _RIGHT) / count
    columns = []
    for rank in range(count):
        below = 0.0
        words = [f"{name} {values[rank]:.1%}" for name, (_, values) in parts.items()]
        drawn = []
        for colour, values in parts.values():
            top, bottom = frame.y(min(1.0, below + values[rank])), frame.y(below)
            left, shown = _LEFT + wide * rank, max(0.5, wide - (2 if wide > 8 else 0.5))
            drawn.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{shown:.1f}" height="{bottom - top:.1f}" fill="{colour}"/>'
            )
            below = min(1.0, below + values[rank])
        columns.append(f"<g><title>rank {rank}: {', '.join(words)}</title>{''.join(drawn)}</g>")
    each = max(1, math.ceil(30 / wide))
    names = "".join(
        f'<text x="{_LEFT + wide * (rank + 0.5):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{rank}</text>'
        for rank in range(0, count, each)
    )
    grid = frame.grid(lambda value: f"{value:.0%}", steps=False)
    means = ", ".join(f"{name} {sum(values) / count:.0%}" for name, (_, values) in parts.items())
    return _svg(f"{title}: on average {means}", title, "", grid + "".join(columns) + names)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from about ``low`` to about ``high``, no more than ``most`` + 1."""
    rough = (high - low) / most if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [number * step for number in range(first, last + 1)]


class _Frame:
    """Where values stand; the scale ends at round numbers."""

    def __init__(self, first: int, last: int, low: float, high: float) -> None:
        self._first, self._last = first, last
        self._marks = ticks(low, high, 4)
        self._low, self.high = self._marks[0], self._marks[-1]

    def x(self, step: float) -> float:
        return _LEFT + (step - self._first) / max(1, self._last - self._first) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self._low) / (self.high - self._low) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self, show: Callable[[float], str], *, steps: bool = True) -> str:
        drawn = []
        for mark in self._marks:
            y = self.y(mark)
            drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{html.escape(show(mark))}</text>')
        if steps:
            marks = {round(mark) for mark in ticks(self._first, self._last, 6)}
            for mark in sorted(mark for mark in marks if self._first <= mark <= self._last):
                x = self.x(mark)
                anchor = "end" if x > _WIDTH - 40 else "middle"
                drawn.append(f'<text x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{mark:,}</text>')
        return "".join(drawn)


def _titles(
    known: Sequence[tuple[int, float]], points: Sequence[tuple[float, float]], show: Callable[[float], str]
) -> str:
    """What shows the values under the pointer: a strip a step, or some steps."""
    each = math.ceil(len(known) / _MOST_PLACES)
    strips = []
    for begin in range(0, len(known), each):
        some = known[begin : begin + each]
        end = min(begin + each, len(points) - 1)
        left, right = points[begin][0], points[end][0]
        mean = sum(value for _, value in some) / len(some)
        words = f"step {some[0][0]:,}" + (f" to {some[-1][0]:,}: mean" if len(some) > 1 else ":")
        strips.append(
            f'<rect class="at" x="{left:.1f}" y="{_TOP}" width="{max(2.0, right - left):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"><title>{html.escape(f"{words} {show(mean)}")}</title></rect>'
        )
    return "".join(strips)


def _step_of(known: Sequence[tuple[int, float]]) -> int:
    return max(known, key=lambda each: each[1])[0]


def _svg(label: str, title: str, note: str, drawn: str) -> str:
    right = f'<text x="{_WIDTH - _RIGHT}" y="14" text-anchor="end">{html.escape(note)}</text>' if note else ""
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        f'<text class="head" x="0" y="14">{html.escape(title)}</text>{right}{drawn}</svg>'
    )
