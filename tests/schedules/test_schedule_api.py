"""What a schedule does around the runtime: splitting, losses, modes, and what it refuses."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from typing import Any

import pytest
import torch

from pp_runtime.errors import PipelineModeError, PipelineTypeError, PipelineUsageError
from pp_runtime.microbatch import TensorChunkSpec, _Replicate
from pp_runtime.schedules import (
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    REDUCE_GRAD,
    SEND_F,
    PipelineScheduleMulti,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    _Action,
    _PipelineScheduleRuntime,
    _ScheduleForwardOnly,
    _wait_batch_p2p,
    get_schedule_class,
)
from tests.helpers.fakes import FakeRuntime, FakeStage, stages_of_rank, use_fake_runtime


@pytest.fixture(autouse=True)
def fake_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_runtime(monkeypatch)


def mse(output: torch.Tensor, target: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    return weight * torch.nn.functional.mse_loss(output, target)


def one_rank(microbatches: int = 4, loss_fn: Any = mse, **options: Any) -> ScheduleGPipe:
    return ScheduleGPipe(FakeStage(0, 1), microbatches, loss_fn, **options)


@pytest.mark.parametrize("rows, sizes", [(8, [2, 2, 2, 2]), (9, [3, 2, 2, 2]), (4, [1, 1, 1, 1])])
def test_step_splits_runs_and_merges(rows: int, sizes: list[int]) -> None:
    schedule, losses = one_rank(), ["stale"]
    x, y = torch.randn(rows, 3), torch.randn(rows, 3)
    output = schedule.step(x, target=y, losses=losses)
    assert torch.equal(output, 2 * x)
    pieces = [args[0] for args in FakeRuntime.made[0].steps[0]["args"]]
    assert [len(piece) for piece in pieces] == sizes
    assert losses == [mse(2 * a, b) for a, b in zip(pieces, torch.tensor_split(y, 4), strict=True)]


def test_gradients_are_divided_by_the_microbatches_unless_told_not_to() -> None:
    x = torch.randn(4, 3)
    schedule, unscaled = one_rank(), one_rank(scale_grads=False)
    for each in (schedule, unscaled):
        each.step(x, target=x)
        each.eval(x)
    assert schedule._stage.scaled == [4] and unscaled._stage.scaled == []


def test_custom_reduction_scales_for_itself() -> None:
    x = torch.randn(4, 3)
    schedule = one_rank()
    schedule.register_custom_function(REDUCE_GRAD, lambda action, ctx: None)
    schedule.step(x, target=x)
    assert schedule._stage.scaled == []


def test_the_programs_list_of_output_chunks_is_kept_and_holds_the_last_steps_outputs() -> None:
    schedule = one_rank()
    chunks: list[torch.Tensor] = [torch.zeros(1)]
    schedule._stage.output_chunks = chunks
    for run in (schedule.step, schedule.eval):
        x = torch.randn(4, 3)
        output = weakref.ref(run(x, target=x))
        assert output() is None and schedule._stage.output_chunks is chunks
        assert torch.equal(torch.cat(chunks), 2 * x)
    schedule.step(x, target=x, return_outputs=False)
    assert chunks == []


def test_outputs_can_be_left_out() -> None:
    schedule = one_rank()
    x = torch.randn(4, 3)
    assert schedule.step(x, target=x, return_outputs=False) is None
    assert FakeRuntime.made[0].steps[0]["return_outputs"] is False


def test_chunk_specs_and_loss_arguments_reach_the_microbatches() -> None:
    schedule = one_rank(2, args_chunk_spec=(TensorChunkSpec(1),), kwargs_chunk_spec={"mask": _Replicate()})
    x, mask, losses = torch.randn(3, 4), torch.ones(7), []
    y = torch.zeros(6, 2)
    schedule.step(x, mask=mask, target=y, losses=losses, loss_kwargs={"weight": 0.0}, return_outputs=False)
    step = FakeRuntime.made[0].steps[0]
    assert step["args"][1][0].shape == (3, 2) and step["kwargs"][1]["mask"] is mask
    assert losses == [0.0, 0.0]


def test_output_merge_spec_merges() -> None:
    schedule = one_rank(2, None, args_chunk_spec=(TensorChunkSpec(1),), output_merge_spec=TensorChunkSpec(1))
    x = torch.randn(3, 4)
    assert torch.equal(schedule.step(x), 2 * x)


@pytest.mark.parametrize("name", ["GPipe", "LoopedBFS", "Interleaved1F1B", "Auto", "PipelineScheduleMulti"])
def test_every_schedule_cuts_targets_by_its_spec(name: str) -> None:
    kind = get_schedule_class(name)
    stages = FakeStage(0, 1) if name == "GPipe" else [FakeStage(0, 1)]
    schedule = kind(stages, 2, mse, target_chunk_spec={"y": TensorChunkSpec(1), "weight": _Replicate()})
    target = {"y": torch.randn(3, 5), "weight": torch.ones(7)}
    first, second = schedule._split_target(target)
    assert first["y"].shape == (3, 3) and second["y"].shape == (3, 2) and second["weight"] is target["weight"]


def test_one_spec_is_for_every_tensor_of_a_target() -> None:
    schedule = one_rank(2, target_chunk_spec=TensorChunkSpec(1))
    pieces = schedule._split_target((torch.zeros(3, 4), [torch.zeros(1, 2, 2), torch.tensor(1.0), "name"]))
    assert [piece[0].shape for piece in pieces] == [(3, 2), (3, 2)]
    assert [tuple(piece[1][0].shape) for piece in pieces] == [(1, 1, 2)] * 2 and pieces[1][1][2] == "name"
    assert pieces[1][1][1] == 1.0


def test_a_target_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(PipelineUsageError, match=r"target\['w'\], a tensor of shape \(3,\), .*target_chunk_spec"):
        one_rank().step(torch.randn(8, 3), target={"y": torch.randn(8, 3), "w": torch.randn(3)})
    with pytest.raises(PipelineUsageError, match="target, a tensor.* no dimension 2 to cut.* target_chunk_spec"):
        one_rank(target_chunk_spec=TensorChunkSpec(2)).step(torch.randn(8, 3), target=torch.randn(8, 3))


def test_a_keyword_input_of_batch_1_goes_whole_to_every_microbatch() -> None:
    position_ids = torch.arange(3)[None]
    for schedule, x in ((one_rank(), torch.randn(8, 3)), (Schedule1F1B(FakeStage(1, 3, 1, 3), 4, mse), None)):
        schedule.step(*([] if x is None else [x]), target=x, position_ids=position_ids)
        assert all(kwargs["position_ids"] is position_ids for kwargs in FakeRuntime.made[-1].steps[0]["kwargs"])


def test_a_batch_that_is_1_is_not_taken_for_several_microbatches() -> None:
    x = torch.randn(1, 3)
    for inputs, keyword in (((x,), {"position_ids": x}), ((), {"x": x, "position_ids": x})):
        with pytest.raises(PipelineUsageError, match="batch of 1"):
            one_rank(loss_fn=None).step(*inputs, **keyword)
    with pytest.raises(PipelineUsageError, match=r"args\[0\].*batch of 8.*args_chunk_spec"):
        one_rank(loss_fn=None).step(x, mask=torch.randn(8, 3))


def test_a_keyword_input_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(PipelineUsageError, match=r"kwargs\['mask'\], a tensor of shape \(2, 3\), .* kwargs_chunk_spec"):
        one_rank(loss_fn=None).step(torch.randn(8, 3), mask=torch.randn(2, 3), other=torch.randn(8))


def test_microbatches_may_come_already_cut() -> None:
    schedule, losses = one_rank(2), []
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    cut = {"arg_mbs": [(x[:1],), (x[1:],)], "kwarg_mbs": [{}, {}], "target_mbs": [y[:1], y[1:]]}
    assert torch.equal(schedule.step(**cut, losses=losses), 2 * x)
    assert losses[1] == mse(2 * x[1:], y[1:])
    assert torch.equal(schedule.eval(**cut), 2 * x)


def test_eval_between_steps_needs_nothing() -> None:
    schedule = one_rank()
    x, losses = torch.randn(4, 3), []
    schedule.step(x, target=x)
    with torch.no_grad():
        assert torch.equal(schedule.eval(x, target=x, losses=losses), 2 * x)
        assert torch.equal(schedule.eval(x), 2 * x)
    schedule.step(x, target=x)
    assert [step["training"] for step in FakeRuntime.made[0].steps] == [True, False, False, True]
    assert len(losses) == 4 and len(FakeRuntime.made) == 1


def test_ranks_in_the_middle_take_nothing_and_return_nothing() -> None:
    schedule = Schedule1F1B(FakeStage(1, 3, 1, 3), 4, mse)
    losses = ["mine"]
    assert schedule.step(losses=losses) is None
    assert FakeRuntime.made[0].steps[0]["args"] == [()] * 4 and losses == ["mine"]


def test_target_counts_only_where_the_last_stage_is() -> None:
    schedule = Schedule1F1B(FakeStage(0, 2, 0, 2), 4, mse)
    x = torch.randn(4, 3)
    schedule.step(x, target=x[:1])
    assert FakeRuntime.made[0].steps[0]["targets"] is None


def test_without_loss_function_a_step_is_forward_only() -> None:
    schedule = one_rank(loss_fn=None)
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(schedule.step(x), 2 * x)
    assert not FakeRuntime.made[0].has_backward and not FakeRuntime.made[0].steps[0]["training"]


def test_forward_only_schedule_never_trains() -> None:
    schedule = _ScheduleForwardOnly(FakeStage(0, 1), 2, mse)
    x = torch.randn(4, 3)
    assert torch.equal(schedule.step(x), 2 * x)
    assert not FakeRuntime.made[0].steps[0]["training"]
    with pytest.raises(RuntimeError, match="forward-only"):
        schedule.step(x, target=x)
    with pytest.raises(RuntimeError, match="forward-only"):
        schedule.step(x, losses=[])


def test_timeline_is_passed_through() -> None:
    schedule = one_rank()
    with pytest.raises(PipelineModeError, match="record_timeline = True"):
        schedule.timeline()
    schedule.record_timeline = True
    x = torch.randn(4, 3)
    schedule.step(x, target=x)
    assert schedule.timeline() == "timeline" and FakeRuntime.made[0].record_timeline


def test_metrics_are_of_the_last_step_if_that_ended() -> None:
    schedule, x = one_rank(), torch.randn(4, 3)
    with pytest.raises(PipelineModeError, match="no metrics before the first step"):
        schedule.metrics()
    schedule.step(x, target=x)
    assert schedule.metrics(tokens=4) == "metrics of 4 tokens"
    with pytest.raises(PipelineUsageError, match="not both"):
        schedule.step(x, target=x, arg_mbs=[(x,)])
    with pytest.raises(PipelineModeError, match="the last step failed"):
        schedule.metrics()
    with pytest.raises(PipelineModeError, match="no metrics before the first step"):
        copy.copy(schedule).metrics()
    schedule.step(x, target=x)
    assert schedule.metrics(tokens=8) == "metrics of 8 tokens"


def test_a_dropped_schedule_is_freed_at_once() -> None:
    schedule = one_rank()
    schedule.register_custom_function(FORWARD, lambda action, ctx: None)
    x = torch.randn(4, 3)
    schedule.step(x, target=x)
    gone = weakref.ref(schedule)
    gc.disable()
    try:
        del schedule
        assert gone() is None
    finally:
        gc.enable()


WRONG_STEPS = [
    ("batch of 2.*4 microbatches", lambda s, x: s.step(x[:2], target=x)),
    ("target has a batch of 2", lambda s, x: s.step(x, target=x[:2])),
    ("needs a target", lambda s, x: s.step(x)),
    ("losses must be a list", lambda s, x: s.step(x, target=x, losses=())),
    ("loss_kwargs must be a dict", lambda s, x: s.step(x, target=x, loss_kwargs=3)),
    ("not both", lambda s, x: s.step(x, arg_mbs=[(x,)] * 4)),
    ("not both", lambda s, x: s.step(target=x, arg_mbs=[])),
    ("4 entries.*got 0", lambda s, x: s.step(arg_mbs=[], target_mbs=[x] * 4)),
    ("arg_mbs\\[1\\] must be a tuple", lambda s, x: s.step(arg_mbs=[(x,), x, (x,), (x,)], target_mbs=[x] * 4)),
    ("kwarg_mbs must be a list", lambda s, x: s.step(kwarg_mbs={"x": x}, target_mbs=[x] * 4)),
]


@pytest.mark.parametrize("says, call", WRONG_STEPS)
def test_wrong_step_says_what_to_change(says: str, call: Any) -> None:
    schedule = one_rank()
    with pytest.raises(PipelineUsageError, match=says):
        call(schedule, torch.randn(8, 3))
    assert not FakeRuntime.made


def test_wrong_step_is_told_to_the_other_ranks() -> None:
    schedule = Schedule1F1B(FakeStage(1, 2, 1, 2), 4, mse)
    schedule.step(target=torch.randn(8, 3))
    with pytest.raises(PipelineUsageError) as caught:
        schedule.step(target=torch.randn(2, 3))
    assert FakeRuntime.made[0].refused == [caught.value] and len(FakeRuntime.made[0].steps) == 1


def test_step_under_no_grad_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no_grad.*eval\(\)"), torch.no_grad():
        one_rank().step(torch.randn(4, 3), target=torch.randn(4, 3))


@pytest.mark.parametrize("call", [{"target": torch.zeros(4, 3)}, {"losses": []}])
def test_loss_without_loss_function_is_an_error(call: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="loss_fn"):
        one_rank(loss_fn=None).step(torch.randn(4, 3), **call)


WRONG_CONSTRUCTIONS = [
    (PipelineUsageError, "at least 1, got 0", lambda: one_rank(0)),
    (PipelineTypeError, "n_microbatches must be an int", lambda: one_rank(2.5)),
    (PipelineTypeError, "n_microbatches must be an int", lambda: one_rank(True)),
    (PipelineTypeError, "loss_fn must be a function", lambda: one_rank(2, "mse")),
    (PipelineTypeError, "kwargs_chunk_spec must be like", lambda: one_rank(kwargs_chunk_spec=(TensorChunkSpec(0),))),
    (PipelineTypeError, "args_chunk_spec must be like", lambda: one_rank(args_chunk_spec=TensorChunkSpec(0))),
    (PipelineTypeError, "takes one stage", lambda: ScheduleGPipe([FakeStage(0, 1)], 2)),
    (PipelineTypeError, "pp_runtime stage, got torch.nn", lambda: ScheduleGPipe(torch.nn.Linear(1, 1), 2)),
    (PipelineUsageError, "one stage a rank", lambda: ScheduleGPipe(FakeStage(0, 4, 0, 2), 2)),
    (PipelineTypeError, "list of stages", lambda: ScheduleInterleaved1F1B(FakeStage(0, 1), 2)),
    (PipelineUsageError, "empty list", lambda: ScheduleInterleaved1F1B([], 2)),
    (PipelineUsageError, "twice", lambda: ScheduleInterleaved1F1B([FakeStage(0, 2), FakeStage(0, 2)], 2)),
    (PipelineUsageError, "num_stages", lambda: ScheduleInterleaved1F1B([FakeStage(0, 2), FakeStage(1, 3)], 2)),
    (PipelineUsageError, "same group", lambda: ScheduleInterleaved1F1B([FakeStage(0, 2), FakeStage(1, 2, 1, 2)], 2)),
    (ValueError, "stages", lambda: ScheduleInterleaved1F1B([FakeStage(0, 3, 0, 2), FakeStage(2, 3, 0, 2)], 2)),
]


@pytest.mark.parametrize("kind, says, make", WRONG_CONSTRUCTIONS)
def test_wrong_construction_says_what_to_change(kind: type[Exception], says: str, make: Any) -> None:
    with pytest.raises(kind, match=says):
        make()


def test_custom_functions_get_their_actions_and_the_step() -> None:
    schedule = ScheduleInterleaved1F1B(stages_of_rank(0, 1, 2), 2, mse)
    seen: list[Any] = []
    counts: list[int] = []

    def handler(action: Any, ctx: Any) -> None:
        seen.append((str(action), ctx.schedule_ref, len(ctx.arg_mbs), len(ctx.target_mbs), ctx.losses))
        counts.append(sum(ctx.schedule_ref.backward_counter.values()))
        assert (0, 0) in ctx.schedule_ref.fwd_recv_ops
        _wait_batch_p2p(ctx.schedule_ref.fwd_recv_ops.pop((0, 0)))

    schedule.register_custom_function(FULL_BACKWARD, handler)
    x, losses = torch.randn(2, 3), []
    schedule.step(x, target=x, losses=losses)
    order = [str(action) for action in FakeRuntime.made[0].order[0] if action.computation_type == FULL_BACKWARD]
    assert [entry[0] for entry in seen] == order and len(order) == 4
    assert all(entry[1:4] == (schedule, 2, 2) and entry[4] is losses for entry in seen)
    assert counts == [0, 1, 2, 3]


def test_losses_of_custom_forwards_stand_in_microbatch_order() -> None:
    schedule = one_rank(3)

    def forward(action: Any, ctx: Any) -> None:
        microbatch = action.microbatch_index
        output = torch.full((1, 1), float(microbatch), requires_grad=True)
        ctx.schedule_ref._maybe_compute_loss(schedule._stage, output, [torch.zeros(1, 1)] * 3, microbatch)
        assert schedule._maybe_get_loss(schedule._stage, microbatch) is not None

    schedule.register_custom_function(FORWARD, forward)
    losses: list[torch.Tensor] = []
    schedule.step(torch.randn(3, 1), losses=losses)
    assert losses == [0.0, 1.0, 4.0] and not any(loss.requires_grad for loss in losses)


def appending(schedule: Any, arrivals: list[list[torch.Tensor]]) -> Any:
    """A forward as older programs have it: it keeps the loss itself, and says what the list then holds."""

    def forward(action: Any, ctx: Any) -> None:
        output = torch.full((1, 1), float(action.microbatch_index), requires_grad=True)
        ctx.schedule_ref._internal_losses.append(schedule._compute_loss(output, torch.zeros(1, 1)))
        arrivals.append(list(schedule._internal_losses))

    return forward


@pytest.mark.parametrize("helper", [True, False])
def test_internal_losses_are_a_list_in_order_of_arrival(helper: bool) -> None:
    schedule = PipelineScheduleMulti([FakeStage(0, 1)], 3, mse)
    schedule.pipeline_order = {0: [_Action.from_str(text) for text in "0F2 0F0 0F1 0B1 0B2 0B0".split()]}
    arrivals: list[list[torch.Tensor]] = []
    started: list[tuple[int, float]] = []
    stage = schedule._stages[0]
    stage._core.set_loss = lambda microbatch, loss: started.append((microbatch, loss.item()))

    def with_helper(action: Any, ctx: Any) -> None:
        microbatch = action.microbatch_index
        output = torch.full((1, 1), float(microbatch), requires_grad=True)
        ctx.schedule_ref._maybe_compute_loss(stage, output, [torch.zeros(1, 1)] * 3, microbatch)
        arrivals.append(list(schedule._internal_losses))

    got: list[Any] = []
    schedule.register_custom_function(FORWARD, with_helper if helper else appending(schedule, arrivals))
    schedule.register_custom_function(
        FULL_BACKWARD, lambda action, ctx: got.append(schedule._maybe_get_loss(stage, action.microbatch_index))
    )
    losses: list[torch.Tensor] = []
    for _ in range(2):
        schedule.step(torch.randn(3, 1), losses=losses)
        assert arrivals.pop() == [4.0, 0.0, 1.0] and losses == [0.0, 1.0, 4.0] and got == [1.0, 4.0, 0.0]
        assert started == [(2, 4.0), (0, 0.0), (1, 1.0)] and schedule._internal_losses == []
        got.clear()
        started.clear()


def test_a_loss_that_no_forward_computed_is_missed() -> None:
    schedule = one_rank(2)
    schedule.register_custom_function(FORWARD, appending(schedule, []))
    schedule._internal_losses.append(torch.tensor(1.0))
    assert schedule._maybe_get_loss(FakeStage(0, 2), 0) is None
    for missing in (1, -1, 7):
        with pytest.raises(RuntimeError, match=f"loss of microbatch {missing} is not available"):
            schedule._maybe_get_loss(schedule._stage, missing)
    without_handler = one_rank(2)
    assert without_handler._maybe_get_loss(without_handler._stage, 0) is None


def test_losses_are_given_and_forgotten_as_torch_gives_them() -> None:
    schedule, losses = one_rank(2), ["stale"]
    for microbatch in (1, 0):
        schedule._maybe_compute_loss(
            schedule._stage, torch.tensor([2.0 + microbatch]), [torch.zeros(1)] * 2, microbatch
        )
    schedule._update_losses([FakeStage(0, 2)], losses)
    assert losses == ["stale"] and schedule._internal_losses == []
    schedule._internal_losses = [torch.tensor(1.0)]
    with pytest.raises(RuntimeError, match="2 losses were expected.* but 1 have"):
        schedule._update_losses(schedule._stage, losses)
    schedule._internal_losses = [torch.tensor(5.0), torch.tensor(6.0)]
    schedule._update_losses(schedule._stage, losses)
    assert losses == [5.0, 6.0] and schedule._internal_losses == []
    for microbatch in (1, 0):
        schedule._maybe_compute_loss(
            schedule._stage, torch.tensor([2.0 + microbatch]), [torch.zeros(1)] * 2, microbatch
        )
    schedule._update_losses([schedule._stage], losses)
    assert losses == [4.0, 9.0]


def test_flags_of_initialization_are_set_by_a_step_and_may_be_reset() -> None:
    x = torch.randn(4, 3)
    schedule = ScheduleInterleaved1F1B([FakeStage(0, 1)], 2, mse)
    assert not schedule._stages_forward_initialized and not schedule._stages_backward_initialized
    schedule.eval(x)
    assert schedule._stages_forward_initialized and not schedule._stages_backward_initialized
    schedule._stages_forward_initialized = False
    schedule.step(x, target=x)
    assert schedule._stages_forward_initialized and schedule._stages_backward_initialized
    single = one_rank(2)
    single._initialize_stage((x,), {})
    assert single._stage_forward_initialized and single._stage_backward_initialized
    assert len(FakeRuntime.made) == 1


@pytest.mark.parametrize("kind", [ScheduleGPipe, ScheduleInterleaved1F1B])
def test_a_programs_own_initialization_runs_with_the_first_microbatch_of_a_step(kind: Any) -> None:
    seen: list[Any] = []

    class Initializing(kind):
        def _initialize_stage(self, args: Any, kwargs: Any, target: Any = None, loss_kwargs: Any = None) -> None:
            seen.append((args[0].shape, kwargs["mask"].shape, target.shape, loss_kwargs))

    stages = FakeStage(0, 1) if kind is ScheduleGPipe else [FakeStage(0, 1)]
    x = torch.randn(5, 3)
    Initializing(stages, 2, mse).step(x, mask=x[:, 0], target=x, loss_kwargs={"weight": 2.0})
    assert seen == [((3, 3), (3,), (3, 3), {"weight": 2.0})]


def test_only_some_types_take_custom_functions() -> None:
    schedule = one_rank()
    with pytest.raises(PipelineUsageError, match="FORWARD, FULL_BACKWARD"):
        schedule.register_custom_function(SEND_F, lambda action, ctx: None)
    with pytest.raises(TypeError, match="callable"):
        schedule.register_custom_function(BACKWARD_WEIGHT, None)


def parameters_of(kind: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(kind).parameters.values()]


def without_our_own(parameters: list[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    return [parameter for parameter in parameters if parameter[0] != "target_chunk_spec"]


def test_constructors_and_methods_have_torchs_signatures() -> None:
    import torch.distributed.pipelining.schedules as theirs

    import pp_runtime.schedules as ours

    names = [name for name, value in vars(theirs).items() if inspect.isclass(value) and "Schedule" in name]
    assert len(names) >= 10
    for name in names:
        mine, torchs = getattr(ours, name), getattr(theirs, name)
        assert without_our_own(parameters_of(mine.__init__)) == parameters_of(torchs.__init__), name
        if mine is not _PipelineScheduleRuntime:
            assert ("target_chunk_spec", inspect.Parameter.KEYWORD_ONLY, None) in parameters_of(mine.__init__), name
        for method in ("step", "eval"):  # which take microbatches since torch 2.14
            assert set(parameters_of(getattr(torchs, method))) <= set(parameters_of(getattr(mine, method))), name
    assert parameters_of(ours.get_schedule_class) == parameters_of(theirs.get_schedule_class)
    assert parameters_of(ours._PipelineContext) == parameters_of(theirs._PipelineContext)
    for name in ("_load_csv", "_dump_csv", "register_custom_function", "_prepare_schedule_with_comms"):
        mine, torchs = getattr(_PipelineScheduleRuntime, name), getattr(theirs._PipelineScheduleRuntime, name)
        assert parameters_of(mine) == parameters_of(torchs), name


def test_use_full_backward_is_accepted_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="use_full_backward"):
        PipelineScheduleMulti([FakeStage(0, 1)], 2, use_full_backward=True)
