"""Schedules of stages that only say how many stages and ranks there are, as planners and PyTorch's tests make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pp_runtime import PipelineStage
from pp_runtime.errors import InvalidOrderError, PipelineModeError
from pp_runtime.orders.catalogue import ORDERS
from pp_runtime.orders.ir import from_torch_form
from pp_runtime.planning.verifier import verify
from pp_runtime.schedules import (
    PipelineScheduleMulti,
    _Action,
    _add_send_recv,
    _format_pipeline_order,
    _PipelineScheduleRuntime,
    _simulate_comms_compute,
    get_schedule_class,
)
from tests.helpers.planned import NAMED, MockOfThePublicStage, MockPipelineStage, plan


@pytest.mark.parametrize("kind", [MockPipelineStage, MockOfThePublicStage])
@pytest.mark.parametrize("name", NAMED)
def test_every_schedule_is_planned_lowered_and_simulated(name: str, kind: Any, tmp_path: Path) -> None:
    schedule = plan(name, 4, 8, kind, rank=2)
    order, rank_of = schedule.pipeline_order, schedule.stage_index_to_group_rank
    compute = {
        rank: [action for action in row if action is None or action.is_compute_op] for rank, row in order.items()
    }
    verify(from_torch_form(compute), tuple(rank_of.values()), 8)
    assert _format_pipeline_order(order).startswith(" ")
    whole = _add_send_recv(compute, rank_of.__getitem__, len(rank_of))
    played = _simulate_comms_compute(whole, rank_of.__getitem__, len(rank_of))
    assert from_torch_form(played) == whole
    assert schedule.pipeline_order_with_comms.keys() == order.keys()
    if isinstance(schedule, _PipelineScheduleRuntime):
        assert from_torch_form(schedule._simulate()) == schedule.pipeline_order_with_comms
        for format in ("compute_only", "compute_comms"):
            schedule._dump_csv(str(tmp_path / "order.csv"), format)
            stages = [kind(group_size=4, num_stages=8) for _ in range(2)]
            again = _PipelineScheduleRuntime(stages, 8)
            again._load_csv(str(tmp_path / "order.csv"), format)
            assert again.stage_index_to_group_rank == rank_of == stages[1].stage_index_to_group_rank
            assert again.pipeline_order_with_comms == schedule.pipeline_order_with_comms


def test_a_stage_may_be_a_mock_of_the_class_given_twice() -> None:
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, 2, 4, None
    schedule = get_schedule_class("Interleaved1F1B")([stage, stage], 4)
    assert schedule.pipeline_order == plan("Interleaved1F1B", 2, 4).pipeline_order


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B"])
def test_only_a_step_needs_the_rest_of_a_stage(name: str) -> None:
    schedule = plan(name, 1, 2)
    for step in (schedule.step, schedule.eval):
        with pytest.raises(PipelineModeError, match=r"not run: its MockPipelineStage .* super\(\).__init__"):
            step(torch.ones(2, 1))
    with pytest.raises(PipelineModeError, match="planned and not run"):
        schedule.memory_report(torch.ones(1))


def test_a_mapping_is_taken_from_an_order_that_is_proved_at_once() -> None:
    def rows(*texts: str) -> dict[int, list[_Action | None]]:
        return {rank: [_Action.from_str(part) for part in text.split()] for rank, text in enumerate(texts)}

    stages = [MockPipelineStage(group_size=2, num_stages=4) for _ in range(2)]
    schedule = PipelineScheduleMulti(stages, 1)
    assert list(schedule.stage_index_to_group_rank.values()) == [0, 1, 0, 1]
    schedule._validate_and_set_stage_mapping(rows("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0"))
    assert schedule.stage_index_to_group_rank == {0: 0, 1: 1, 2: 1, 3: 0} == stages[0].stage_index_to_group_rank
    assert schedule.pipeline_order == {}
    for wrong in (rows("0F0 3F0 3B0 0B0", "1F0 2F0 1B0 2B0"), rows("0F0 0B0 1F0 1B0 2F0 2B0 3F0 3B0")):
        with pytest.raises(InvalidOrderError, match="deadlocks|ranks"):
            schedule._validate_and_set_stage_mapping(wrong)
    assert schedule.stage_index_to_group_rank == {0: 0, 1: 1, 2: 1, 3: 0}
    schedule._validate_and_set_stage_mapping(rows("0F0 2F0", "1F0 3F0"))
    assert list(schedule.stage_index_to_group_rank.values()) == [0, 1, 0, 1]


def test_all_names_were_planned() -> None:
    assert set(NAMED) | {"ForwardOnly"} == set(ORDERS) | {"Auto"}
