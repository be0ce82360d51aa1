"""Stages whose backward is hard to split train as the plain model does, under every schedule."""

import pytest

from tests.helpers import api, hard_models, ranks
from tests.helpers.hard_models import Checkpointed
from tests.helpers.pipelines import EVERY_SCHEDULE, SPLITTING, Setting, Twins, compare_all, stages_allowed

_NAMES = sorted(set(hard_models.MODELS) - {"compiled"})


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_equals_the_plain_model(schedule: str) -> None:
    if api.IS_TORCH and schedule in SPLITTING:
        pytest.skip("torch: cannot split several of these")
    stages_per_rank = stages_allowed(schedule, 2)[-1]
    ranks.run(compare_all, 2, settings=[Setting(schedule, 4, stages_per_rank, name) for name in _NAMES])


@api.ours_only("refuses compiled modules where backward is split")
@pytest.mark.parametrize("schedule", ["1F1B", *SPLITTING])
def test_compiled_stages_equal_the_plain_model(schedule: str) -> None:
    stages_per_rank = stages_allowed(schedule, 2)[-1]
    ranks.run(compare_all, 2, settings=[Setting(schedule, 3, stages_per_rank, "compiled")])


def _count_forwards(rank: int, schedule: str, model: str) -> list[int]:
    twins = Twins(rank, Setting(schedule, 4, stages_allowed(schedule, 2)[-1], model))
    twins.train("step", twins.example.batch(8, 0))
    return [module.forwards for module in twins.mine.values() if isinstance(module, Checkpointed)]


@api.ours_only("recomputes once a group of parameters where backward is split")
@pytest.mark.parametrize("model", ["checkpointed", "checkpointed_reentrant"])
@pytest.mark.parametrize("schedule", ["GPipe", "Interleaved1F1B", *SPLITTING])
def test_a_checkpointed_block_runs_forward_twice(schedule: str, model: str) -> None:
    for counts in ranks.run(_count_forwards, 2, schedule=schedule, model=model):
        assert all(count == 2 * 4 * 2 for count in counts), counts  # two runs, four microbatches, two blocks
