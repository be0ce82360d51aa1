"""Every schedule trains as the unpipelined model does: any ranks, stages a rank and microbatches that it allows."""

from typing import Any

import pytest

from tests.helpers import api, models, ranks
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    LOOPED,
    SPLITTING,
    V_SHAPED,
    Setting,
    Twins,
    compare_all,
    stages_allowed,
)


def _counts(count: int) -> list[int]:
    """Microbatches: 1, p-1, p, p+1, 2p, 4p."""
    return sorted({1, max(1, count - 1), count, count + 1, 2 * count, 4 * count})


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_equals_the_plain_model(count: int, schedule: str) -> None:
    settings = [
        Setting(schedule, microbatches, stages_per_rank)
        for stages_per_rank in stages_allowed(schedule)
        for microbatches in _counts(count)
    ]
    ranks.run(compare_all, count, settings=settings)


_DIFFICULT = ["dropout", "frozen", "masks", "no_parameters", "norms", "routed", "shared", "transformer", "untouched"]


@pytest.mark.parametrize("schedule", [*LOOPED, *V_SHAPED])
def test_equals_the_plain_model_whatever_the_stages(schedule: str) -> None:
    stages_per_rank = stages_allowed(schedule)[-1]
    settings = [
        Setting(schedule, 5, stages_per_rank, model=model)
        for model in models.usable(_DIFFICULT)
        if not (api.IS_TORCH and schedule in SPLITTING and model == "frozen")  # torch leaves gradients out
    ]
    ranks.run(compare_all, 2, settings=settings)


def _search(rank: int, options: list[dict[str, Any]]) -> list[str]:
    """Searched orders under a cap of memory and on a V-shaped placement."""
    found = []
    for given in options:
        owners = given.get("placement")
        twins = Twins(rank, Setting("Auto", 5, 2), owners=owners, **given)
        for number in range(2):
            found += [f"{given}: {line}" for line in twins.train(f"step {number}", twins.example.batch(10, number))]
    return found


@api.ours_only("searches for no order")
def test_a_searched_order_equals_the_plain_model() -> None:
    options = [{"memory_cap": 4}, {"placement": (0, 1, 1, 0)}, {"placement": (0, 1, 1, 0), "memory_cap": 3}]
    assert ranks.run(_search, 2, options=options) == [[], []]
