"""What a run shows of itself: the timeline has every action once, the profiler a range for each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from torch.profiler import profile

from tests.helpers import api, ranks
from tests.helpers.pipelines import Setting, Twins, step

pytestmark = api.ours_only("has none of these")

SCHEDULES = [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("DualPipeV", 2)]
MICROBATCHES = 4
every_kind = pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)


def _expected(twins: Twins, rank: int) -> Counter[str]:
    """Each forward and backward of this rank, once; those of an overlapped pair too."""
    actions = [action for action in twins.schedule.pipeline_order[rank] if action is not None]
    parts = [part for action in actions for part in action.sub_actions or (action,)]
    return Counter(str(part) for part in parts if part.microbatch_index is not None)


def _record(rank: int, schedule: str, stages_per_rank: int, folder: str) -> list[str]:
    twins = Twins(rank, Setting(schedule, MICROBATCHES, stages_per_rank))
    twins.schedule.record_timeline = True
    found = []
    for number in range(2):
        step(twins.schedule, twins.stages, twins.example.batch(2 * MICROBATCHES, number))
        timeline = twins.schedule.timeline()
        spans = timeline.of_rank(rank)
        seen = Counter(span.action for span in spans)
        found += [f"{action}: {seen[action]} times" for action in _expected(twins, rank) if seen[action] != 1]
        found += [f"{span.action} ends before it starts" for span in spans if span.end < span.start]
    timeline.to_chrome(f"{folder}/{rank}.json")
    return found


@every_kind
def test_the_timeline_has_every_action_once(schedule: str, stages_per_rank: int, tmp_path: Path) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "folder": str(tmp_path)}
    assert ranks.run(_record, 2, **arguments) == [[], []]
    for rank in range(2):
        events = json.loads((tmp_path / f"{rank}.json").read_text())["traceEvents"]
        assert any(event.get("ph") == "X" and event["dur"] >= 0 for event in events)


def _profile(rank: int, schedule: str, stages_per_rank: int) -> list[str]:
    twins = Twins(rank, Setting(schedule, MICROBATCHES, stages_per_rank))
    step(twins.schedule, twins.stages, twins.example.batch(2 * MICROBATCHES, 0))
    with profile() as profiler:
        step(twins.schedule, twins.stages, twins.example.batch(2 * MICROBATCHES, 1))
    seen = Counter(event.name for event in profiler.events() if event.name.startswith("PP:"))
    return [f"PP:{action}: {seen[f'PP:{action}']}" for action in _expected(twins, rank) if seen[f"PP:{action}"] != 1]


@every_kind
def test_the_profiler_has_a_range_for_every_action(schedule: str, stages_per_rank: int) -> None:
    assert ranks.run(_profile, 2, schedule=schedule, stages_per_rank=stages_per_rank) == [[], []]
