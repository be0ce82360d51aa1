"""GPipe and 1F1B train as the unpipelined model does: outputs, losses, gradients, buffers and parameters are equal."""

import dataclasses

import pytest
import torch

from tests.helpers import api, models, ranks, reference
from tests.helpers.pipelines import Setting, Twins, compare_all, differences_of_step, make_schedule, make_stages, step
from tests.helpers.reference import Batch


def _counts(ranks_count: int) -> list[int]:
    """Microbatches: one, around the number of ranks, and more."""
    return sorted({1, max(1, ranks_count - 1), ranks_count, ranks_count + 1, 2 * ranks_count})


@pytest.mark.parametrize("model", models.usable())
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_single_stage_schedules_equal_the_plain_model(count: int, model: str) -> None:
    settings = [
        Setting(schedule, microbatches, model=model)
        for schedule in ("GPipe", "1F1B")
        for microbatches in _counts(count)
    ]
    ranks.run(compare_all, count, settings=settings)


def _unscaled_and_longer(rank: int) -> None:
    settings = [Setting(schedule, 4, steps=5) for schedule in ("GPipe", "1F1B")]
    compare_all(rank, settings)
    compare_all(rank, settings, scale_grads=False)


def test_training_goes_on_for_many_steps_and_gradients_are_summed_where_scaling_is_off() -> None:
    ranks.run(_unscaled_and_longer, 2)


def _two_ones(rank: int) -> float:
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(linear.weight)
    stages = make_stages({rank: linear}, 2)
    schedule = make_schedule("1F1B", stages, 2, torch.nn.functional.mse_loss)
    step(schedule, stages, Batch((torch.ones(2, 1),), torch.zeros(2, 1)))
    torch.optim.SGD(linear.parameters(), lr=0.125).step()
    return linear.weight.item()


def test_gradients_are_scaled_once() -> None:
    assert ranks.run(_two_ones, 2) == [1 - 2 * 0.125] * 2


def _gradients_pile_up(rank: int) -> list[str]:
    """Two steps without zero_grad; scaling is off, for torch would scale the first step's part twice."""
    twins = Twins(rank, Setting("1F1B", 3), scale_grads=False)
    sums = [torch.zeros_like(parameter) for parameter in twins.plain.parameters()]
    for number in range(2):
        batch = twins.example.batch(6, number)
        step(twins.schedule, twins.stages, batch)
        reference.train_step(twins.example.stages, batch, twins.example.loss_fn, 3, scale=False)
        for total, parameter in zip(sums, twins.plain.parameters(), strict=True):
            total += parameter.grad
    for total, parameter in zip(sums, twins.plain.parameters(), strict=True):
        parameter.grad = total
    twins.example = dataclasses.replace(twins.example, exact=False)  # three sums of three, not one of six
    return twins.differences("after two steps")


def test_gradients_accumulate_over_steps_until_they_are_zeroed() -> None:
    assert ranks.run(_gradients_pile_up, 2) == [[], []]


def _return_nothing(rank: int) -> list[str]:
    twins = Twins(rank, Setting("GPipe", 3))
    batch = twins.example.batch(6, 0)
    expected = reference.train_step(twins.example.stages, batch, twins.example.loss_fn, 3)
    got = step(twins.schedule, twins.stages, batch, return_outputs=False)
    found = [] if got.outputs is None else ["outputs were returned"]
    if twins.holds_last:
        found += reference.differences("losses", got.losses, expected.losses)
    return found + twins.differences("a step that returns no outputs")


def test_outputs_are_left_out_on_demand() -> None:
    assert ranks.run(_return_nothing, 2) == [[], []]


def _forward_only(rank: int) -> list[str]:
    twins = Twins(rank, Setting("GPipe", 3))
    schedule = api.schedules._ScheduleForwardOnly(twins.stages[0], 3)
    found = []
    for number in range(2):
        batch = twins.example.batch(6, number)
        with torch.no_grad():
            expected = reference.evaluate(twins.example.stages, batch, 3)
            got = step(schedule, twins.stages, Batch(batch.args))
        found += differences_of_step(f"step {number}", got, expected, last=twins.holds_last)
    return found


def test_forward_only_returns_the_plain_outputs() -> None:
    assert ranks.run(_forward_only, 3) == [[], [], []]
