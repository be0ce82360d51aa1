"""Costs of a model from a timeline of one of its steps, and from what a user writes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

from pp_runtime.pictures import Span, Spans, read_chrome
from pp_runtime.timing.costs import Costs, PerStage


def measured_costs(timeline: Spans) -> Costs:
    """The median time of each kind of action on each stage, waiting left out, and of a message between ranks.

    A stage that the timeline does not show (another rank's, before ``gather``) gets the median of the others. Where
    only split backwards ran, a full one takes as long as both halves; where only full ones ran, each half takes half.
    ValueError if there is no forward to learn from.
    """
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    overlaps: list[Span] = []
    for span in timeline.spans:
        if span.kind == "OVERLAP_F_B":
            overlaps.append(span)
        elif span.kind in ("F", "I", "W", "B", "UNSHARD", "RESHARD", "REDUCE_GRAD"):
            times[span.kind][span.parsed().stage_index].append(max(0.0, span.worked))
    if not times["F"]:
        raise ValueError("The timeline has no forward, so it says nothing about costs; take one of a whole step.")
    num_stages = 1 + max(stage for kind in times.values() for stage in kind)
    found = {kind: _by_stage(stages, num_stages) for kind, stages in times.items() if stages}
    full = found.get("B")
    halves = None if full is None else tuple(time / 2 for time in full)
    input_half, weight_half = found.get("I", halves), found.get("W", halves)
    extra: dict[str, PerStage] = {
        name: found[kind]
        for kind, name in (("UNSHARD", "unshard"), ("RESHARD", "reshard"), ("REDUCE_GRAD", "reduce_grad"))
        if kind in found
    }
    costs = Costs(
        forward=found["F"],
        backward_input=input_half if input_half is not None else 0.0,
        backward_weight=weight_half if weight_half is not None else 0.0,
        full_backward=full,
        transfer=_transfer_time(timeline.spans),
        **extra,  # type: ignore[arg-type]
    )
    return costs.with_overrides(overlap=_overlap_share(overlaps, costs)) if overlaps else costs


def read_costs(source: str) -> Costs:
    """Costs from a text, from a JSON file of costs, or from a Chrome trace of a measured run."""
    if not source.endswith(".json"):
        return Costs.from_text(source)
    with open(source, encoding="utf-8") as file:
        content = json.load(file)
    if isinstance(content, dict) and "traceEvents" not in content:
        return Costs.from_mapping(content)
    return measured_costs(read_chrome(source))


def _by_stage(stages: Mapping[int, list[float]], num_stages: int) -> tuple[float, ...]:
    medians = {stage: median(times) for stage, times in stages.items()}
    typical = median(medians.values())
    return tuple(medians.get(stage, typical) for stage in range(num_stages))


def _overlap_share(overlaps: Iterable[Span], costs: Costs) -> float:
    shares = []
    for span in overlaps:
        apart = sum(costs.of(part) for part in span.parsed().sub_actions or ())
        if apart > 0:
            shares.append(max(0.0, span.worked) / apart)
    return median(shares) if shares else 1.0


def _transfer_time(spans: Iterable[Span]) -> float:
    """From the start of a send to the end of the receive that was already waiting for it; the median of those.

    A receive that did not wait says only that the message had come by then. Spanss of a single rank, which show
    one end of each message, give what the sends and receives themselves took.
    """
    sent: dict[tuple[bool, int, int | None], float] = {}
    received: list[tuple[tuple[bool, int, int | None], Span]] = []
    own: list[float] = []
    for span in spans:
        if span.kind not in ("SEND_F", "SEND_B", "RECV_F", "RECV_B"):
            continue
        action = span.parsed()
        forward = span.kind.endswith("F")
        own.append(max(0.0, span.worked))
        if span.kind.startswith("SEND"):
            sent[forward, action.stage_index, action.microbatch_index] = span.start
        else:
            source = action.stage_index + (-1 if forward else 1)
            received.append(((forward, source, action.microbatch_index), span))
    flights = [span.end - sent[key] for key, span in received if key in sent and sent[key] >= span.start]
    return max(0.0, median(flights)) if flights else median(own) if own else 0.0
