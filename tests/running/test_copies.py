"""Stages and schedules can be copied, and pickled where they have no process group; a copy trains on its own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pp_runtime
from pp_runtime.errors import PipelineUsageError
from pp_runtime.schedules import FORWARD, FULL_BACKWARD, PipelineScheduleSingle
from tests.helpers import ranks
from tests.helpers.pipelines import make_schedule
from tests.helpers.planned import NAMED, MockPipelineStage, plan

WIDTH, MICROBATCHES = 3, 4


def _mse(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def _stages(rank: int, per_rank: int, group: Any) -> list[Any]:
    torch.manual_seed(5)
    modules = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2 * per_rank)]
    device = torch.device("cpu")
    return [
        pp_runtime.PipelineStage(modules[index], index, 2 * per_rank, device, group=group)
        for index in range(rank, 2 * per_rank, 2)
    ]


def _step(schedule: Any, rank: int) -> list[Tensor]:
    """Losses and gradients of a step."""
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    losses: list[Tensor] = []
    schedule.step(*([x] if rank == 0 else []), **({"target": x, "losses": losses} if rank == 1 else {}))
    gradients: list[Any] = []
    for stage in schedule._stages:
        gradients += [weight.grad for weight in stage.submod.parameters()]
        stage.submod.zero_grad()
    return losses + gradients


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def _copy_and_train(rank: int, name: str, own_group: bool, through_pickle: bool) -> list[bool]:
    group = dist.new_group([0, 1]) if own_group else None
    schedule = make_schedule(name, _stages(rank, 1 if name == "1F1B" else 2, group), MICROBATCHES, _mse)
    duplicate = (lambda value: pickle.loads(pickle.dumps(value))) if through_pickle else copy.deepcopy
    before = duplicate(schedule)
    expected = _step(schedule, rank)
    after = duplicate(schedule)
    found = [_same(_step(each, rank), expected) for each in (before, schedule, after, copy.deepcopy(before))]
    for each in (before, after):
        stage, own = each._stages[-1], schedule._stages[-1]
        found += [stage is not own, stage.submod is not own.submod, stage.group is group]
    return found


@pytest.mark.parametrize(("own_group", "through_pickle"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble"])
def test_a_copied_schedule_trains_as_the_one_it_is_of(name: str, own_group: bool, through_pickle: bool) -> None:
    found = ranks.run(_copy_and_train, 2, name=name, own_group=own_group, through_pickle=through_pickle)
    assert found == [[True] * 10] * 2


def _copied_stages(rank: int) -> list[bool]:
    group = dist.new_group([0, 1])
    stage = _stages(rank, 1, group)[0]
    shallow, deep = copy.copy(stage), copy.deepcopy(stage)
    memo: dict[int, Any] = {}
    twice = copy.deepcopy([stage, stage], memo)
    found = [shallow.submod is stage.submod, deep.submod is not stage.submod, deep.group is group, twice[0] is twice[1]]
    deep.submod[0].weight.data.zero_()
    found.append(bool(stage.submod[0].weight.any()))
    for each in (shallow, deep, twice[0]):
        schedule = make_schedule("GPipe", [each], MICROBATCHES, _mse)
        found.append(all(gradient is not None for gradient in _step(schedule, rank)))
    try:
        pickle.dumps(stage)
    except PipelineUsageError as error:
        found.append(f"stage {rank} cannot be pickled with its process group" in str(error))
    stage.group = None
    again = pickle.loads(pickle.dumps(stage))
    found.append(torch.equal(again.submod[0].weight, stage.submod[0].weight) and again.stage_index == rank)
    return found


def test_copied_stages_run_and_share_only_the_group() -> None:
    assert ranks.run(_copied_stages, 2) == [[True] * 10] * 2


def _copied_traced_stage(rank: int) -> bool:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    spec = {"1": pp_runtime.SplitPoint.BEGINNING}
    pipe = pp_runtime.pipeline(model, mb_args=(torch.randn(2, WIDTH),), split_spec=spec)
    stage = pipe.build_stage(rank, torch.device("cpu"))
    duplicate = make_schedule("GPipe", [copy.deepcopy(stage)], MICROBATCHES, _mse)
    return _same(_step(duplicate, rank), _step(make_schedule("GPipe", [stage], MICROBATCHES, _mse), rank))


def test_a_copied_traced_stage_trains_as_the_one_it_is_of() -> None:
    assert ranks.run(_copied_traced_stage, 2) == [True, True]


@pytest.mark.parametrize("name", NAMED)
def test_planned_schedules_of_every_name_are_copied_and_pickled(name: str) -> None:
    schedule = plan(name, 2, 4)
    for duplicate in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)), copy.copy(schedule)):
        duplicate._forget_order()
        assert duplicate.pipeline_order == schedule.pipeline_order
        assert type(duplicate._stages[0]) is MockPipelineStage
    single = isinstance(schedule, PipelineScheduleSingle)
    assert copy.deepcopy(schedule)._stages[0] is not schedule._stages[0] and single == hasattr(schedule, "_stage")


def _custom_functions_of_a_copy(rank: int) -> list[int]:
    schedule = make_schedule("1F1B", _stages(rank, 1, None), MICROBATCHES, _mse)
    called = [0, 0]

    def forward(action: Any, context: Any) -> None:
        called[context.schedule_ref is not schedule] += 1
        stage, microbatch = context.schedule_ref._stage, action.microbatch_index
        output = stage.forward_one_chunk(microbatch, context.arg_mbs[microbatch])
        context.schedule_ref._maybe_compute_loss(stage, output, context.target_mbs, microbatch)

    schedule.register_custom_function(FORWARD, forward)
    duplicate = copy.deepcopy(schedule)
    duplicate.register_custom_function(FULL_BACKWARD, lambda action, context: None)
    _step(schedule, rank)
    return [*called, len(schedule._comp_type_to_function_map), len(duplicate._comp_type_to_function_map)]


def test_a_copy_has_the_custom_functions_and_takes_others_for_itself() -> None:
    assert ranks.run(_custom_functions_of_a_copy, 2) == [[MICROBATCHES, 0, 1, 2]] * 2
