"""Measured and planned timelines: what they say, and that they survive files and processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pp_runtime.orders.catalogue import build_order
from pp_runtime.pictures.perfetto import write_chrome
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.timing.as_planned import as_planned
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.simulation import simulate
from pp_runtime.timing.timeline import Span, Timeline
from tests.helpers import ranks

RECORDS = [
    ("0F0", 1_000_000_000, 1_002_000_000, 0),
    ("0SEND_F0", 1_002_000_000, 1_002_500_000, 0),
    ("0RECV_B0", 1_002_500_000, 1_006_500_000, 3_500_000),
    ("0B0", 1_006_500_000, 1_010_500_000, 0),
]


def test_records_become_seconds_busy_and_waiting() -> None:
    timeline = Timeline.from_records(3, RECORDS)
    assert timeline.ranks == (3,)
    assert timeline.makespan == pytest.approx(0.0105)
    assert timeline.busy(3) == pytest.approx(0.006)
    assert timeline.waiting(3) == pytest.approx(0.0035)
    assert timeline.bubble == pytest.approx(1 - 6 / 10.5)
    assert [span.kind for span in timeline.of_rank(3)] == ["F", "SEND_F", "RECV_B", "B"]


def test_an_empty_timeline_has_no_length() -> None:
    assert (Timeline(()).makespan, Timeline(()).bubble, Timeline(()).ranks) == (0.0, 0.0, ())


def test_kind_of_an_overlap_is_not_that_of_its_parts() -> None:
    assert Span(0, "(0F5;7B2)OVERLAP_F_B", 0.0, 1.0).kind == "OVERLAP_F_B"
    assert Span(0, "12REDUCE_GRAD", 0.0, 1.0).kind == "REDUCE_GRAD"


def test_chrome_trace_is_json_with_an_event_a_span_and_reads_back(tmp_path: Path) -> None:
    timeline = Timeline.from_records(1, RECORDS)
    path = tmp_path / "run.json"
    timeline.to_chrome(path)
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in spans] == [record[0] for record in RECORDS]
    assert spans[0]["dur"] == pytest.approx(2000.0)
    assert spans[0]["args"] | {"stage": 0, "microbatch": 0} == spans[0]["args"]
    back = Timeline.from_chrome(path)
    assert [span.action for span in back.spans] == [span.action for span in timeline.spans]
    assert back.makespan == pytest.approx(timeline.makespan)
    assert back.waiting(1) == pytest.approx(timeline.waiting(1))


def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text in ("not json", "[]", '{"traceEvents": [{"ph": "X", "pid": 0}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="other.json is not a trace"):
            Timeline.from_chrome(path)


def test_planned_and_measured_stand_in_one_trace(tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    timeline = Timeline.from_records(0, RECORDS)
    write_chrome(path, {"planned": timeline, "measured": timeline.shifted(5.0)})
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"planned", "measured"}
    assert {event["ts"] for event in events if event["ph"] == "X" and event["name"] == "0F0"} == {0.0}


@pytest.mark.parametrize("name", ["1F1B", "ZB1P", "DualPipeV"])
def test_costs_of_a_played_timeline_are_the_costs_it_was_played_with(name: str) -> None:
    stages = 8 if name == "DualPipeV" else 4
    costs = Costs(
        forward=tuple(1.0 + stage / 8 for stage in range(stages)),
        backward_input=1.5,
        backward_weight=1.5,
        overlap=0.75,
    )
    order, _ = build_order(name, 4, stages, 12)
    found = simulate(order, costs).timeline().costs()
    for kind in ("forward", "backward_input", "backward_weight", "full_backward"):
        assert found.by_stage(kind, stages) == pytest.approx(costs.by_stage(kind, stages)), kind
    if name == "DualPipeV":
        assert found.overlap == pytest.approx(0.75)


def test_transfer_is_measured_where_the_receiver_was_already_waiting() -> None:
    waited = Timeline.from_records(
        0, [("0F0", 0, 10, 0), ("0SEND_F0", 10, 11, 0), ("0F1", 11, 20, 0), ("0SEND_F1", 20, 21, 0)]
    )
    other = Timeline.from_records(
        1, [("1RECV_F0", 0, 14, 13), ("1F0", 14, 40, 0), ("1RECV_F1", 40, 41, 0), ("1F1", 41, 50, 0)]
    )
    assert Timeline(waited.spans + other.spans).costs().transfer == pytest.approx(4e-9)


def test_one_ranks_timeline_gives_its_costs_to_the_stages_it_does_not_show() -> None:
    timeline = Timeline.from_records(1, [("1F0", 0, 3_000_000_000, 0), ("1B0", 3_000_000_000, 9_000_000_000, 0)])
    costs = timeline.costs()
    assert costs.by_stage("forward", 2) == pytest.approx((3.0, 3.0))
    assert costs.by_stage("backward_input", 2) == pytest.approx((3.0, 3.0))


def test_costs_of_a_timeline_that_was_not_gathered_say_to_gather_it() -> None:
    timeline = Timeline.from_records(0, [("0F0", 0, 3, 0), ("2F0", 3, 6, 0), ("2B0", 6, 9, 0), ("0B0", 9, 12, 0)])
    with pytest.raises(ValueError, match=r"3 numbers for 4 stages.* call its gather\(\) first"):
        timeline.costs().by_stage("forward", 4)


def test_a_timeline_knows_the_stages_that_it_shows() -> None:
    assert simulate(build_order("DualPipeV", 2, 4, 4)[0]).timeline().num_stages == 4
    assert Timeline.from_records(0, [("0F0", 0, 3, 0), ("2F0", 3, 6, 0)]).num_stages == 3
    assert Timeline(()).num_stages == 0


def test_a_timeline_without_a_forward_has_no_costs() -> None:
    with pytest.raises(ValueError, match="no forward"):
        Timeline.from_records(0, [("0B0", 0, 1, 0)]).costs()


def test_planned_timeline_leaves_out_actions_that_take_no_time() -> None:
    order, placement = build_order("1F1B", 2, 2, 2)
    timeline = simulate(insert_communication(order, placement)).timeline()
    assert {span.kind for span in timeline.spans} == {"F", "B"}


def _gather(rank: int) -> Timeline:
    return Timeline.from_records(rank, [(f"{rank}F0", 1_000_000_000 * rank, 1_000_000_000 * (rank + 1), 0)]).gather()


def test_every_rank_gets_the_timeline_of_all() -> None:
    first, second = ranks.run(_gather, ranks=2)
    assert first.spans == second.spans
    assert first.ranks == (0, 1)
    assert first.makespan == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_a_step_as_planned_is_the_simulation_at_its_median_times(name: str) -> None:
    stages = 2 if name == "1F1B" else 4
    order, placement = build_order(name, 2, stages, 6)
    costs = Costs(1.0, 1.5, 0.5, overlap=0.8, transfer=0.25)
    planned = simulate(order, costs, placement=placement).timeline()
    late = [Span(s.rank, s.action, s.start + s.rank, s.end + s.rank + 0.1 * (s.action == "0F3")) for s in planned.spans]
    again = as_planned(Timeline(tuple(late)))
    # Nothing is known of messages, and the one late action is no median.
    expected = simulate(order, costs.with_overrides(transfer=0.0), placement=placement).timeline()
    assert again.makespan == pytest.approx(expected.makespan)
    assert {(s.rank, s.action) for s in again.spans} == {(s.rank, s.action) for s in planned.spans}


def test_a_step_of_one_rank_has_no_plan() -> None:
    alone = Timeline(simulate(build_order("1F1B", 2, 2, 4)[0]).timeline().of_rank(1))
    with pytest.raises(ValueError):
        as_planned(alone)
