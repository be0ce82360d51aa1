"""Comparing the schedules on what a run was measured to take."""

from __future__ import annotations

import re

import pytest

from pp_runtime.orders.catalogue import build_order
from pp_runtime.planning.search.comparison import compare, compare_measured
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.simulation import simulate


def test_a_measured_timeline_says_for_which_pipeline_the_schedules_are_compared() -> None:
    order, _ = build_order("1F1B", 2, 2, 4)
    timeline = simulate(order, Costs.from_mapping({"F": [1.0, 2.0], "B": [2.0, 4.0]})).timeline()
    measured = compare_measured(timeline)
    assert measured.rows == compare(2, 2, 4, timeline.costs()).rows
    assert {"1F1B", "GPipe"} <= {row.name for row in measured.rows}
    row = next(row for row in measured.rows if row.name == "1F1B")
    assert abs(row.makespan - timeline.makespan) < 1e-9


@pytest.mark.parametrize(
    ("counts", "costs", "message"),
    [
        ((2, 4, 0), Costs(), "got 0 microbatches"),
        ((0, 4, 4), Costs(), "got 0 ranks"),
        ((2, 4, 4), Costs(forward=(1.0, 1.0, 1.0)), "3 numbers for 4 stages"),
        ((2, 4, 4), Costs(transfer=(1.0, 1.0)), "2 numbers for 4 stages"),
    ],
)
def test_what_every_schedule_would_refuse_is_said_once(
    counts: tuple[int, int, int], costs: Costs, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        compare(*counts, costs)
    assert len(re.findall(message, str(refused.value))) == 1
    assert "1F1B" not in str(refused.value)
