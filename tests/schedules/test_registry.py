"""Schedules by name, where they put their stages, and the orders that they hold, load and show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pp_runtime.errors import InvalidOrderError, PipelineModeError, PipelineUsageError
from pp_runtime.orders.catalogue import build_order
from pp_runtime.orders.ir import Action, from_torch_form
from pp_runtime.orders.placement import looped, v_shaped
from pp_runtime.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    ScheduleAuto,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleVMin,
    ScheduleZBVZeroBubble,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from pp_runtime.schedules.registry import SCHEDULE_CLASSES
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.simulation import simulate
from pp_runtime.timing.timeline import Timeline
from tests.helpers.fakes import FakeRuntime, FakeStage, stages_of_rank, use_fake_runtime


@pytest.fixture(autouse=True)
def fake_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_runtime(monkeypatch)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).sum()


@pytest.mark.parametrize("name", SCHEDULE_CLASSES)
def test_names_are_found_in_any_case(name: str) -> None:
    assert get_schedule_class(name) is get_schedule_class(name.upper()) is get_schedule_class(name.lower())


def test_torchs_names_are_all_known() -> None:
    from torch.distributed.pipelining import schedules as theirs

    for name in SCHEDULE_CLASSES:
        try:
            torchs = theirs.get_schedule_class(name)
        except ValueError:
            continue
        ours = get_schedule_class(name)
        assert ours.__name__ == torchs.__name__
        for base in ("PipelineScheduleSingle", "PipelineScheduleMulti", "_PipelineScheduleRuntime"):
            is_theirs = issubclass(torchs, getattr(theirs, base))
            assert issubclass(ours, getattr(__import__("pp_runtime.schedules").schedules, base)) == is_theirs


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Unknown schedule name 'nope'.*1F1B"):
        get_schedule_class("nope")
    with pytest.raises(TypeError, match="str"):
        get_schedule_class(ScheduleGPipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_every_named_schedule_makes_its_order(ranks: int, microbatches: int) -> None:
    for name, kind in SCHEDULE_CLASSES.items():
        if name.startswith("PipelineSchedule") or (name == "DualPipeV" and microbatches < 2 * ranks):
            continue
        for rank in range(ranks):
            if issubclass(kind, PipelineScheduleSingle):
                schedule: Any = kind(FakeStage(rank, ranks, rank, ranks), microbatches, loss)
            else:
                v = kind in (ScheduleZBVZeroBubble, ScheduleDualPipeV, ScheduleVMin, get_schedule_class("VHalf"))
                placement = (v_shaped if v else looped)(ranks, 2 * ranks)
                schedule = kind(stages_of_rank(rank, ranks, 2 * ranks, placement), microbatches, loss)
                assert tuple(schedule.stage_index_to_group_rank.values()) == placement
            stage = schedule._stages[0]
            assert stage.stage_index_to_group_rank == schedule.stage_index_to_group_rank
            assert sorted(schedule.pipeline_order) == list(range(ranks))


def test_shown_orders_equal_torchs() -> None:
    ours = ScheduleGPipe(FakeStage(0, 2, 0, 2), 2, loss)
    text = {rank: [str(action) for action in row] for rank, row in ours.pipeline_order.items()}
    assert text == {
        0: ["0F0", "0F1", "0B0", "0B1", "0REDUCE_GRAD"],
        1: ["1F0", "1F1", "1B0", "1B1", "1REDUCE_GRAD"],
    }
    looped_order = ScheduleInterleaved1F1B(stages_of_rank(0, 2, 4), 2, loss).pipeline_order
    assert looped_order[1][0] is None and str(looped_order[1][1]) == "1F0"


def test_order_with_comms_has_sends_and_receives() -> None:
    schedule = ScheduleGPipe(FakeStage(1, 2, 1, 2), 1, loss)
    text = [str(action) for action in schedule.pipeline_order_with_comms[1]]
    assert text == ["1UNSHARD", "1RECV_F0", "1F0", "1B0", "1SEND_B0", "1REDUCE_GRAD", "1RESHARD"]


def write(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_file_says_where_stages_are(tmp_path: Path) -> None:
    file = write(tmp_path / "order.csv", ["0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1", "1F0,1F1,1B0,1B1"])
    schedule = _PipelineScheduleRuntime([FakeStage(0, 3, 0, 2), FakeStage(2, 3, 0, 2)], 2, loss)
    schedule._load_csv(file)
    assert schedule.stage_index_to_group_rank == {0: 0, 1: 1, 2: 0}
    schedule.step(torch.zeros(2, 1), target=torch.zeros(2, 1))
    assert FakeRuntime.made[0].placement == (0, 1, 0) and not FakeRuntime.made[0].with_comms


@pytest.mark.parametrize("format", ["compute_only", "compute_comms"])
def test_dumped_order_loads_again(tmp_path: Path, format: Any) -> None:
    file = str(tmp_path / "order.csv")
    named = ScheduleInterleaved1F1B(stages_of_rank(0, 2, 4), 3, loss)
    named._dump_csv(file, format)
    loaded = _PipelineScheduleRuntime(stages_of_rank(0, 2, 4), 3, loss)
    loaded._load_csv(file, format)
    assert loaded.pipeline_order_with_comms == named.pipeline_order_with_comms
    loaded.step(torch.zeros(3, 1), target=torch.zeros(3, 1))
    assert FakeRuntime.made[0].with_comms == (format == "compute_comms")


def test_wrong_file_is_refused_and_the_schedule_stays(tmp_path: Path) -> None:
    schedule = ScheduleInterleaved1F1B(stages_of_rank(0, 1, 2), 1, loss)
    before = schedule.pipeline_order
    with pytest.raises(InvalidOrderError):
        schedule._load_csv(write(tmp_path / "missing.csv", ["0F0,1F0,1B0"]))
    with pytest.raises(InvalidOrderError, match="2 stages on 1 ranks"):
        schedule._load_csv(write(tmp_path / "small.csv", ["0F0,0B0"]))
    with pytest.raises(ValueError, match="compute_only"):
        schedule._load_csv(write(tmp_path / "x.csv", ["0F0,0B0"]), "other")  # type: ignore[arg-type]
    assert schedule.pipeline_order == before


def test_schedule_without_order_says_how_to_get_one() -> None:
    with pytest.raises(PipelineModeError, match="_load_csv"):
        PipelineScheduleMulti([FakeStage(0, 1)], 2, loss).step(torch.zeros(2, 1), target=torch.zeros(2, 1))


def test_subclass_may_fill_in_its_order_rank_by_rank() -> None:
    class Mine(_PipelineScheduleRuntime):
        def __init__(self, stages: Any, n_microbatches: int, **options: Any) -> None:
            super().__init__(stages, n_microbatches, **options)
            self.pipeline_order = {}
            for rank in range(self.pp_group_size):
                self.pipeline_order[rank] = [None] * rank + [Action.from_str("0F0"), None, Action.from_str("0B0")]
            self._prepare_schedule_with_comms(self.pipeline_order)

    schedule = Mine([FakeStage(0, 1)], 1, loss_fn=loss)
    schedule.step(torch.zeros(1, 1), target=torch.zeros(1, 1))
    assert FakeRuntime.made[0].order == from_torch_form(schedule.pipeline_order)


def test_single_subclass_may_bring_its_order() -> None:
    class Mine(PipelineScheduleSingle):
        def _get_pipeline_order(self) -> Any:
            return {0: [Action.from_str(text) for text in ("0F1", "0F0", "0B0", "0B1")]}

    schedule = Mine(FakeStage(0, 1), 2, loss)
    schedule.step(torch.zeros(2, 1), target=torch.zeros(2, 1))
    assert [str(action) for action in FakeRuntime.made[0].order[0]] == ["0F1", "0F0", "0B0", "0B1"]


def test_auto_takes_any_placement() -> None:
    placement = v_shaped(2, 4)
    schedule = ScheduleAuto(stages_of_rank(1, 2, 4, placement), 4, loss, placement=placement, memory_cap=4)
    assert tuple(schedule.stage_index_to_group_rank.values()) == placement
    assert ScheduleAuto(stages_of_rank(1, 2, 4), 4, loss).stage_index_to_group_rank == {0: 0, 1: 1, 2: 0, 3: 1}
    with pytest.raises(PipelineUsageError, match="placement"):
        ScheduleAuto(stages_of_rank(1, 2, 4), 4, loss, placement=(0, 0, 0, 0))


def test_auto_takes_its_costs_from_a_measured_step_of_another_schedule() -> None:
    costs = Costs(forward=(1.0, 1.0, 9.0, 9.0))
    measured = simulate(build_order("Interleaved1F1B", 2, 4, 4)[0], costs).timeline()
    stages = stages_of_rank(0, 2, 4)
    orders = []
    for options in ({}, {"memory_cap": 4}):
        schedule = ScheduleAuto.from_timeline(measured, stages, 4, loss, **options)
        given = ScheduleAuto(stages, 4, loss, costs=costs, **options)
        assert schedule.pipeline_order == given.pipeline_order
        orders.append(schedule.pipeline_order)
    assert orders[0] != ScheduleAuto(stages, 4, loss).pipeline_order
    assert orders[0] != orders[1]


def test_auto_of_a_measured_step_recuts_the_costs_for_its_own_stages() -> None:
    measured = simulate(build_order("1F1B", 2, 2, 4)[0], Costs(forward=(1.0, 9.0))).timeline()
    stages = stages_of_rank(1, 2, 4)
    schedule = ScheduleAuto.from_timeline(measured, stages, 4, loss)
    costs = Costs(forward=(0.5, 0.5, 4.5, 4.5), backward_input=0.5, backward_weight=0.5)
    given = ScheduleAuto(stages, 4, loss, costs=costs)
    assert schedule.pipeline_order == given.pipeline_order != ScheduleAuto(stages, 4, loss).pipeline_order


def test_auto_of_a_timeline_that_was_not_gathered_says_to_gather_it() -> None:
    whole = simulate(build_order("1F1B", 2, 2, 4)[0]).timeline()
    alone = Timeline(whole.of_rank(1))
    with pytest.raises(PipelineUsageError, match=r"1 of the pipeline's 2 ranks: call its gather\(\) first"):
        ScheduleAuto.from_timeline(alone, stages_of_rank(1, 2, 2), 4, loss)
    with pytest.raises(ValueError, match="stage"):
        ScheduleAuto.from_timeline(whole, [], 4, loss)
