"""A user's own handlers of actions are called with the right actions in the right order, and can do all the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers import api, ranks, reference
from tests.helpers.failures import PROMPT, Met, meet
from tests.helpers.pipelines import Setting, Twins, make_schedule, make_stages, step

SCHEDULES = [("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2)]
MICROBATCHES = 6
every_kind = pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)


def _stages(schedule: Any) -> dict[int, Any]:
    return {stage.stage_index: stage for stage in schedule._stages}


def _receive(received: dict[tuple[int, int], Any], action: Any) -> None:
    api.schedules._wait_batch_p2p(received.pop((action.stage_index, action.microbatch_index)))


def forward(action: Any, context: Any) -> None:
    """What torchtitan's own handlers do for a forward."""
    schedule, index, microbatch = context.schedule_ref, action.stage_index, action.microbatch_index
    stages = _stages(schedule)
    stage = stages[index]
    schedule._assert_unsharded(stage)
    if not stage.is_first and index - 1 not in stages:
        _receive(schedule.fwd_recv_ops, action)
    output = stage.forward_one_chunk(microbatch, context.arg_mbs[microbatch], context.kwarg_mbs[microbatch])
    schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
    if index + 1 in stages:
        stages[index + 1].set_local_fwd_input(output, microbatch)


def backward(action: Any, context: Any, full: bool = True) -> None:
    """The same for a full backward or the one for inputs."""
    schedule, index, microbatch = context.schedule_ref, action.stage_index, action.microbatch_index
    stages = _stages(schedule)
    stage = stages[index]
    schedule._assert_unsharded(stage)
    if not stage.is_last and index + 1 not in stages:
        _receive(schedule.bwd_recv_ops, action)
    loss = schedule._maybe_get_loss(stage, microbatch)
    last = False
    if full:
        schedule.backward_counter[index] += 1
        last = schedule.backward_counter[index] == schedule._n_microbatches
    stage.backward_one_chunk(microbatch, loss=loss, full_backward=full, last_backward=last)
    if index - 1 in stages:
        stages[index - 1].set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)


def backward_input(action: Any, context: Any) -> None:
    backward(action, context, full=False)


def backward_weight(action: Any, context: Any) -> None:
    schedule, index = context.schedule_ref, action.stage_index
    schedule.backward_counter[index] += 1
    last = schedule.backward_counter[index] == schedule._n_microbatches
    _stages(schedule)[index].backward_weight_one_chunk(action.microbatch_index, last_backward=last)


def overlapped(action: Any, context: Any) -> None:
    for part in action.sub_actions:
        (forward if part.computation_type == api.schedules.FORWARD else backward)(part, context)


def reduce_grad(action: Any, context: Any) -> None:
    schedule = context.schedule_ref
    _stages(schedule)[action.stage_index].perform_reduce_grad(schedule._n_microbatches if schedule.scale_grads else 1)


def nothing(action: Any, context: Any) -> None:
    """Unsharding and resharding are nothing for a stage without FSDP."""


def _handlers() -> dict[Any, Callable[[Any, Any], None]]:
    names = api.schedules
    return {
        names.FORWARD: forward,
        names.FULL_BACKWARD: backward,
        names.BACKWARD_INPUT: backward_input,
        names.BACKWARD_WEIGHT: backward_weight,
        names.OVERLAP_F_B: overlapped,
        names.REDUCE_GRAD: reduce_grad,
        names.UNSHARD: nothing,
        names.RESHARD: nothing,
    }


def _train_with(rank: int, schedule: str, stages_per_rank: int, kinds: list[str]) -> list[str]:
    """Train with handlers of these kinds; each must be called for all of its actions, in the order of the plan."""
    twins = Twins(rank, Setting(schedule, MICROBATCHES, stages_per_rank))
    called: list[Any] = []

    def recording(handler: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def call(action: Any, context: Any) -> None:
            called.append(action)
            assert context.schedule_ref is twins.schedule and len(context.arg_mbs) == MICROBATCHES
            handler(action, context)

        return call

    registered = {kind: handler for kind, handler in _handlers().items() if str(kind) in kinds}
    for kind, handler in registered.items():
        twins.schedule.register_custom_function(kind, recording(handler))
    found = []
    for number in range(2):
        called.clear()
        found += twins.train(f"step {number}", twins.example.batch(2 * MICROBATCHES, number))
        planned = twins.schedule.pipeline_order_with_comms[rank]
        expected = [action for action in planned if action.computation_type in registered]
        if [str(action) for action in called] != [str(action) for action in expected]:
            found.append(f"step {number}: called for {called}, not for {expected}")
    return found


@every_kind
@pytest.mark.parametrize(
    "kinds",
    [["F"], ["B"], ["I", "W"], ["F", "B", "I", "W", "OVERLAP_F_B"], ["REDUCE_GRAD"], ["UNSHARD", "RESHARD"]],
    ids="+".join,
)
def test_training_with_the_users_handlers_equals_the_plain_model(
    schedule: str, stages_per_rank: int, kinds: list[str]
) -> None:
    found = ranks.run(_train_with, 2, schedule=schedule, stages_per_rank=stages_per_rank, kinds=kinds)
    assert found == [[], []]


def _look_at_context(rank: int) -> dict[str, Any]:
    twins = Twins(rank, Setting("Interleaved1F1B", MICROBATCHES, 2))
    seen: dict[str, Any] = {}

    def look(action: Any, context: Any) -> None:
        seen["targets"] = context.target_mbs and [tuple(target.shape) for target in context.target_mbs]
        seen["inputs"] = [tuple(part.shape for part in parts) for parts in context.arg_mbs]
        seen["losses"] = context.losses is None or context.losses is losses
        reduce_grad(action, context)

    twins.schedule.register_custom_function(api.schedules.REDUCE_GRAD, look)
    batch, losses = twins.example.batch(2 * MICROBATCHES, 0), list[torch.Tensor]()
    if rank == 0:
        twins.schedule.step(*batch.args)
    else:
        twins.schedule.step(target=batch.target, losses=losses)
    return seen


def test_a_handler_sees_the_steps_microbatches() -> None:
    first, last = ranks.run(_look_at_context, 2)
    assert first == {"targets": None, "inputs": [((2, 4),)] * MICROBATCHES, "losses": True}
    assert last == {"targets": [(2, 4)] * MICROBATCHES, "inputs": [()] * MICROBATCHES, "losses": True}


def _fail_in_handler(rank: int) -> Met | None:
    twins = Twins(rank, Setting("Interleaved1F1B", MICROBATCHES, 2))

    def fail(action: Any, context: Any) -> None:
        raise LookupError(f"the user's handler failed at {action}")

    if rank == 1:
        twins.schedule.register_custom_function(api.schedules.FULL_BACKWARD, fail)
    return meet(lambda: step(twins.schedule, twins.stages, twins.example.batch(2 * MICROBATCHES, 0)))


@api.ours_only("the other rank hangs until the process group's time-out")
def test_a_failing_handler_is_an_error_on_every_rank() -> None:
    for met in ranks.run(_fail_in_handler, 2):
        assert met is not None and met.seconds < PROMPT
        assert "the user's handler failed at 3B0" in met.text


def test_communication_has_no_handlers() -> None:
    ranks.run(_refuse_communication, 1)


def _refuse_communication(rank: int) -> None:
    twins = Twins(rank, Setting("Interleaved1F1B", 2, 2))
    for kind in (api.schedules.SEND_F, api.schedules.RECV_B):
        with pytest.raises(ValueError, match="REDUCE_GRAD"):
            twins.schedule.register_custom_function(kind, nothing)


def _delay_weights(rank: int) -> list[str]:
    """dw_builder: the user's own weight backward takes the place of W."""
    twins = Twins(rank, Setting("InterleavedZeroBubble", MICROBATCHES, 1))
    log: list[str] = []
    module = twins.mine[rank]

    def builder() -> Callable[[], None]:
        log.append("built")
        return lambda: log.append("ran")

    stages = make_stages({rank: module}, dist.get_world_size(), dw_builder=builder)
    schedule = make_schedule("InterleavedZeroBubble", stages, MICROBATCHES, twins.example.loss_fn)
    batch = twins.example.batch(2 * MICROBATCHES, 0)
    expected = reference.train_step(twins.example.stages, batch, twins.example.loss_fn, MICROBATCHES)
    got = step(schedule, stages, batch)
    found = reference.differences("losses", got.losses, expected.losses) if rank == 1 else []
    if log.count("built") != MICROBATCHES or log.count("ran") != MICROBATCHES:
        found.append(f"dw_builder: {log}")
    return found


def test_dw_builder_is_asked_once_a_microbatch_and_its_answer_run_once() -> None:
    assert ranks.run(_delay_weights, 2) == [[], []]
