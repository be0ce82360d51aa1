"""Which stages a rank holds: those that its schedule itself puts there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pp_runtime import ScheduleZBVZeroBubble, stages_of_rank
from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import dump_order, named_order
from tests.helpers import api
from tests.helpers.pipelines import EVERY_SCHEDULE, held_by, stages_allowed

pytestmark = api.ours_only("has no placement to ask")


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_named_schedules(schedule: str) -> None:
    for ranks in (1, 2, 3):
        for each in stages_allowed(schedule):
            found = [stages_of_rank(schedule, rank, ranks, each * ranks) for rank in range(ranks)]
            assert found == [held_by(rank, schedule, ranks, each) for rank in range(ranks)]


def test_without_a_count_there_are_as_many_stages_as_the_schedule_takes() -> None:
    assert stages_of_rank("1f1b", 1, 4) == [1]
    assert stages_of_rank("Interleaved1F1B", 1, 4) == stages_of_rank("auto", 1, 4) == [1, 5]
    assert stages_of_rank(ScheduleZBVZeroBubble, 1, 4) == [1, 6]


def test_an_order_in_a_file_says_itself(tmp_path: Path) -> None:
    path = tmp_path / "order.csv"
    dump_order(path, named_order("DualPipeV", 2, 4, 4))
    assert [stages_of_rank(path, rank, 2) for rank in range(2)] == [[0, 3], [1, 2]]
    assert stages_of_rank(str(path), 0, 2, 4) == [0, 3]
    with pytest.raises(PipelineUsageError, match="is an order for 2 ranks and 4 stages, not for 4 ranks"):
        stages_of_rank(path, 0, 4)


def test_an_order_in_a_file_that_has_a_stage_on_two_ranks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "order.csv"
    path.write_text("0F0,0B0\n0F1,0B1\n")
    with pytest.raises(ValueError, match="Stage 0 stands on rank 0 and on rank 1"):
        stages_of_rank(path, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1F1B", 0, 2, 4), "1F1B takes 1 a rank, and 4 stages on 2 ranks are not"),
        (("Interleaved1F1B", 0, 2, 3), "equally many on each rank"),
        (("2F2B", 0, 2), "there is no schedule '2F2B'; there are GPipe"),
        (("GPipe", 2, 2), "there is no rank 2 of 2"),
    ],
)
def test_what_a_schedule_does_not_take_is_said(arguments: tuple, words: str) -> None:
    with pytest.raises(PipelineUsageError, match=words):
        stages_of_rank(*arguments)
