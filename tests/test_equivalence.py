"""GPipe and 1F1B train as the unpipelined model does: outputs, losses, gradients, buffers and parameters are equal."""

import pytest

from tests import api, models, ranks
from tests.pipelines import Setting, compare_all

# torch sends contiguous tensors only, and runs a hidden forward at the first step.
_TORCH_FAILS = {"masks", "transposed", "in_place", "norms", "dropout"}
_MODELS = sorted(set(models.MODELS) - (_TORCH_FAILS if api.IS_TORCH else set()))


def _counts(ranks_count: int) -> list[int]:
    """Microbatches: one, around the number of ranks, and more."""
    return sorted({1, max(1, ranks_count - 1), ranks_count, ranks_count + 1, 2 * ranks_count})


@pytest.mark.parametrize("model", _MODELS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_single_stage_schedules_equal_the_plain_model(count: int, model: str) -> None:
    settings = [
        Setting(schedule, microbatches, model=model)
        for schedule in ("GPipe", "1F1B")
        for microbatches in _counts(count)
    ]
    ranks.run(compare_all, count, settings=settings)
