"""A training run as one self-contained HTML page: what it was, its steps, its ranks, a step's timeline, its memory."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pp_runtime.pictures.charts import CHART_STYLE, line_chart, share_chart
from pp_runtime.pictures.html_page import page_of
from pp_runtime.pictures.palette import LOOKS
from pp_runtime.pictures.spans import Spans
from pp_runtime.pictures.timeline_view import PAGE_STYLE, VIEW_STYLE, legend_of, view_of

RUN_VERSION = 1
"""Of what a run's file holds beside the timeline."""


def write_report(path: str | Path, run: Mapping[str, Any], timelines: Mapping[str, Spans]) -> None:
    """Write the page of what :class:`pp_runtime.RunRecord` saved, or of a timeline alone."""
    title = html.escape(str(run.get("title") or "pipeline run"))
    body = f"<h1>{title}</h1>" + "".join(
        f"<section><h2>{head}</h2>{content}</section>" for head, content in _sections(run, timelines) if content
    )
    Path(path).write_text(page_of(title, body, PAGE_STYLE + VIEW_STYLE + CHART_STYLE + _STYLE), encoding="utf-8")


_STYLE = """h2{font-size:14px;margin:22px 0 8px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px 20px;margin:0;max-width:1500px}
dt{color:var(--quiet);font-size:12px}dd{margin:0;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:18px 40px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:3px 14px 3px 0;text-align:right;white-space:nowrap}th{color:var(--quiet);font-weight:400}
tr{border-bottom:1px solid var(--line)}
@media print{.hint button{display:none}}
"""


def _sections(run: Mapping[str, Any], timelines: Mapping[str, Spans]) -> Iterator[tuple[str, str]]:
    steps = _Steps(run.get("columns", {}))
    yield "Run", _pairs({**run.get("facts", {}), **steps.summary(), **_bubbles(timelines)})
    charts = [*steps.charts(), _shares(run.get("ranks", []))]
    yield "Steps", f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    yield _timeline_head(run, timelines), _timeline(timelines)
    yield "Memory of messages, by rank", _table(run.get("memory", {}))


def _pairs(facts: Mapping[str, Any]) -> str:
    rows = (
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f"<dl>{''.join(rows)}</dl>" if facts else ""


def _bubbles(timelines: Mapping[str, Spans]) -> dict[str, str]:
    return {f"bubble, {name} step": f"{timeline.bubble:.1%}" for name, timeline in timelines.items()}


def _timeline_head(run: Mapping[str, Any], timelines: Mapping[str, Spans]) -> str:
    step = run.get("timeline_step")
    what = "Step" if step is None else f"Step {step:,}"
    return f"{what}, planned and measured" if len(timelines) > 1 else f"{what} of the timeline"


def _timeline(timelines: Mapping[str, Spans]) -> str:
    if not any(timeline.spans for timeline in timelines.values()):
        return '<p class="hint">No step was recorded: set <code>schedule.record_timeline = True</code> before one.</p>'
    words = (
        "" if len(timelines) < 2 else
        '<p class="hint">"planned" is the same order at the median times that its actions took in the measured step, '
        "with nothing in between: what is longer in the measured one was waiting and bookkeeping.</p>"
    )  # fmt: skip
    return words + view_of(timelines, "s")


def _shares(ranks: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for row in ranks if row.get("compute_s") is not None and row.get("step_s")]
    if not rows:
        return ""
    compute = [min(1.0, row["compute_s"] / row["step_s"]) for row in rows]
    waiting = [
        min(1.0 - done, (row.get("waiting_s") or 0.0) / row["step_s"]) for done, row in zip(compute, rows, strict=True)
    ]
    other = [1.0 - one - two for one, two in zip(compute, waiting, strict=True)]
    parts = {
        "compute": (LOOKS["B"].shade(), compute),
        "waiting": ("var(--waiting)", waiting),
        "messages and bookkeeping": (LOOKS["SEND_F"].shade(), other),
    }
    legend = legend_of({words: colour for words, (colour, _) in parts.items()})
    return f"<div>{share_chart('share of a step, by rank', parts)}{legend}</div>"


def _table(memory: Mapping[str, Any]) -> str:
    rows = memory.get("rows", [])
    if not rows:
        return ""
    heads = "".join(f"<th>{html.escape(str(head))}</th>" for head in memory["heads"])
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


class _Steps:
    """The columns of numbers over steps."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = columns
        self._steps: list[int] = [int(step) for step in columns.get("step", [])]
        self._trained = [bool(each) for each in columns.get("training", [True] * len(self._steps))]

    def summary(self) -> dict[str, str]:
        """Medians over the steps that trained."""
        found = {"steps": f"{self._steps[0]:,} to {self._steps[-1]:,}"} if self._steps else {}
        for name, (words, show, _) in _KNOWN.items():
            values = [value for value in self._of(name) if value is not None]
            if values:
                found[f"{words}, median"] = show(median(values))
        return found

    def charts(self) -> Iterator[str]:
        """First what a user noted, such as a loss, then what is always known."""
        always = {"step", "training", *_KNOWN, *_NOT_SHOWN}
        for name in self._columns:
            if name not in always:
                yield line_chart(name, self._steps, self._columns[name], _plain, from_zero=False)
        for name, (words, show, from_zero) in _KNOWN.items():
            yield line_chart(words, self._steps, self._of(name), show, from_zero=from_zero)

    def _of(self, name: str) -> list[float | None]:
        values = self._columns.get(name, [None] * len(self._steps))
        return [value if trained else None for value, trained in zip(values, self._trained, strict=True)]


def _seconds(value: float) -> str:
    if value >= 1.0 or value == 0.0:
        return f"{value:.4g} s"
    return f"{value * 1e3:.4g} ms" if value >= 1e-3 else f"{value * 1e6:.4g} µs"


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _large(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:.4g}"


def _bytes(value: float) -> str:
    text = _large(value)
    return f"{text}B" if " " in text else f"{text} B"


def _percent(value: float) -> str:
    return f"{value:.3g}%" if (value := 100 * value) < 100 else "100%"


_KNOWN: Mapping[str, tuple[str, Callable[[float], str], bool]] = {
    "step_s": ("step time, slowest rank", _seconds, True),
    "tokens_per_s": ("tokens a second", _large, True),
    "bubble": ("bubble, all ranks", _percent, True),
    "mfu": ("model FLOPs utilisation", _percent, True),
    "sent_bytes": ("bytes sent by all ranks", _bytes, True),
}
_NOT_SHOWN = ("compute_s", "waiting_s", "host_step_s", "host_waiting_s", "received_bytes", "flops_per_s")
