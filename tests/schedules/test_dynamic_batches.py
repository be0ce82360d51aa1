"""Batches may change from step to step: size, sequence length, training or evaluation, rows no count divides."""

import pytest

from tests.helpers import api, ranks
from tests.helpers.pipelines import Setting, Twins

SCHEDULES = [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]

pytestmark = api.ours_only("buffers keep the first batch's shape")


def _run_script(rank: int, setting: Setting, script: list[tuple[str, int]]) -> list[str]:
    twins = Twins(rank, setting)
    found = []
    for number, (method, rows) in enumerate(script):
        name = f"{number}: {method} of {rows} rows"
        found += getattr(twins, method)(name, twins.example.batch(rows, number))
    return found


def _check(schedule: str, stages_per_rank: int, script: list[tuple[str, int]], model: str = "mlp") -> None:
    setting = Setting(schedule, 4, stages_per_rank, model)
    assert ranks.run(_run_script, 2, setting=setting, script=script) == [[], []]


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_smaller_last_batch_trains_on_its_own_rows(schedule: str, stages_per_rank: int) -> None:
    _check(schedule, stages_per_rank, [("train", 16), ("train", 16), ("train", 8), ("train", 16), ("train", 4)])


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_larger_batch_follows_a_smaller_one(schedule: str, stages_per_rank: int) -> None:
    _check(schedule, stages_per_rank, [("train", 4), ("train", 16), ("train", 12)])


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_rows_that_the_microbatches_do_not_divide(schedule: str, stages_per_rank: int) -> None:
    _check(schedule, stages_per_rank, [("train", 9), ("train", 11), ("evaluate", 6), ("train", 9), ("train", 5)])


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_evaluation_between_training_steps_changes_nothing(schedule: str, stages_per_rank: int) -> None:
    script = [("evaluate", 8), ("train", 8), ("evaluate", 4), ("train", 8), ("evaluate", 8), ("train", 12)]
    _check(schedule, stages_per_rank, script)


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_smaller_batches_of_tokens_and_of_several_tensors(schedule: str, stages_per_rank: int) -> None:
    script = [("train", 8), ("train", 5), ("evaluate", 8), ("train", 8)]
    _check(schedule, stages_per_rank, script, "transformer")
    _check(schedule, stages_per_rank, script, "masks")


def _change_lengths(rank: int, schedule: str, stages_per_rank: int) -> list[str]:
    twins = Twins(rank, Setting(schedule, 4, stages_per_rank, "transformer"))
    found = []
    for number, length in enumerate([5, 3, 4, 5, 1]):
        batch = twins.example.batch(8, number)
        cut = batch.__class__((batch.args[0][:, :length],), batch.target[:, :length])
        found += twins.train(f"length {length}", cut)
    return found


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_sequence_length_changes(schedule: str, stages_per_rank: int) -> None:
    assert ranks.run(_change_lengths, 2, schedule=schedule, stages_per_rank=stages_per_rank) == [[], []]
