"""Timelines as Chrome trace JSON, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pp_runtime.orders import Action, leaves
from pp_runtime.pictures.spans import Span, Spans


def write_chrome(
    path: str | Path,
    timelines: Mapping[str, Spans],
    microseconds: float = 1e6,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write named timelines beside each other: one process a timeline, one thread a rank.

    ``microseconds`` is how many microseconds one unit of the spans becomes: 1e6 for seconds. ``more`` is what else the
    file holds, which :func:`read_trace` gives back.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        separator = ""
        for process, (name, timeline) in enumerate(timelines.items()):
            for event in _events(process, name, timeline.from_zero(), microseconds):
                file.write(separator + json.dumps(event, separators=(",", ":")))
                separator = ",\n"
        other = {"microseconds_a_unit": microseconds} | ({} if more is None else {_MORE: more})
        file.write('\n],"otherData":' + json.dumps(other, separators=(",", ":"), allow_nan=False) + "}\n")


def read_chrome(path: str | Path) -> Spans:
    """The first timeline of a file that :func:`write_chrome` wrote; ValueError for other files."""
    return read_trace(path)[0]


def read_trace(path: str | Path) -> tuple[Spans, dict[str, Any] | None]:
    """The same, and what was written beside timelines; None where that was nothing."""
    content = _content_of(path)
    more = content["otherData"].get(_MORE)
    return _first_timeline(path, content), more if isinstance(more, dict) else None


def _first_timeline(path: str | Path, content: dict[str, Any]) -> Spans:
    try:
        scale = float(content["otherData"].get("microseconds_a_unit", 1e6))
        events = [event for event in content["traceEvents"] if event.get("ph") == "X" and event.get("pid") == 0]
        return Spans(
            tuple(
                Span(
                    int(event["tid"]),
                    str(event["args"]["action"]),
                    event["ts"] / scale,
                    (event["ts"] + event["dur"]) / scale,
                    event["args"].get("waited_us", 0.0) / scale,
                )
                for event in events
            )
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _not_ours(path, error) from None


_MORE = "pp_runtime"


def _content_of(path: str | Path) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise _not_ours(path, error) from None
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise _not_ours(path, ValueError("it has no list of traceEvents"))
    other = content.get("otherData")
    return content | {"otherData": other if isinstance(other, dict) else {}}


def _not_ours(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a trace that pp_runtime wrote: {error!r}.")


def _events(process: int, name: str, timeline: Spans, scale: float) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
    for rank in timeline.ranks:
        label = {"pid": process, "tid": rank}
        yield {"ph": "M", **label, "name": "thread_name", "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", **label, "name": "thread_sort_index", "args": {"sort_index": rank}}
    for span in timeline.spans:
        yield {
            "ph": "X",
            "pid": process,
            "tid": span.rank,
            "ts": span.start * scale,
            "dur": (span.end - span.start) * scale,
            "name": span.action,
            "cat": span.kind,
            "args": {"action": span.action, "waited_us": span.waited * scale, **_facts(span.parsed())},
        }


def _facts(action: Action) -> dict[str, Any]:
    parts = list(leaves([action]))
    if action.sub_actions is not None:
        return {"stages": [part.stage_index for part in parts], "microbatches": [p.microbatch_index for p in parts]}
    return {"stage": action.stage_index, "microbatch": action.microbatch_index}
