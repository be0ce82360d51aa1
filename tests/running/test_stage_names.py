"""The methods of torch's stages that move messages: nothing to do inside a step, and said where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pp_runtime
from pp_runtime.errors import PipelineModeError, PipelineUsageError
from pp_runtime.running.stages.torch_names import _WITHOUT_COUNTERPART
from pp_runtime.schedules import FORWARD, FULL_BACKWARD, _wait_batch_p2p
from pp_runtime.schedules.torch_forms.names import _batch_p2p, _sorted_batch_p2p
from pp_runtime.stage import PipelineStage, _normalize_model_output_as_tuple
from tests.helpers import ranks
from tests.helpers.fakes import FakeStage

torch_stage = pytest.importorskip("torch.distributed.pipelining.stage")

OPERATIONS = ("get_fwd_recv_ops", "get_bwd_recv_ops", "get_fwd_send_ops", "get_bwd_send_ops")


def _messages_in_a_step(rank: int) -> list[Any]:
    """Custom functions as torch's own runtime does it, with the messages of this stage asked for and waited for."""
    stage = PipelineStage(nn.Linear(3, 3), rank, 2, torch.device("cpu"))
    schedule = pp_runtime.Schedule1F1B(stage, 2, loss_fn=nn.functional.mse_loss)
    found: list[Any] = []

    def forward(action: Any, context: Any) -> None:
        microbatch = action.microbatch_index
        found.append(stage.get_fwd_recv_ops(microbatch))
        _wait_batch_p2p(_batch_p2p(stage.get_fwd_recv_ops(microbatch)))
        output = stage.forward_one_chunk(microbatch, context.arg_mbs[microbatch], context.kwarg_mbs[microbatch])
        schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
        found.append(stage.get_fwd_send_ops(microbatch))

    def backward(action: Any, context: Any) -> None:
        found.append(stage.get_bwd_recv_ops(action.microbatch_index))
        loss = schedule._maybe_get_loss(stage, action.microbatch_index)
        stage.backward_one_chunk(action.microbatch_index, loss=loss)
        found.append(stage.get_bwd_send_ops(action.microbatch_index))

    schedule.register_custom_function(FORWARD, forward)
    schedule.register_custom_function(FULL_BACKWARD, backward)
    x = torch.ones(2, 3)
    schedule.step(*([x] if rank == 0 else []), target=x if rank == 1 else None)
    for name in OPERATIONS:
        with pytest.raises(PipelineModeError, match=rf"{name}\(\) was called outside of a step"):
            getattr(stage, name)(0)
    return [found == [[]] * 8, stage.submod.weight.grad is not None]


def test_inside_a_step_the_runtime_moves_the_messages() -> None:
    assert ranks.run(_messages_in_a_step, 2) == [[True, True]] * 2


def test_a_failed_step_ends_too() -> None:
    schedule = pp_runtime.ScheduleGPipe(FakeStage(0, 1), 2)
    with pytest.raises((AttributeError, PipelineUsageError)):
        schedule.step(torch.ones(2, 1))  # a fake has nothing to run, and there may be no group
    with pytest.raises(PipelineModeError, match="outside of a step"):
        schedule._stage.get_fwd_recv_ops(0)


SINCE_2_14 = {"_pre_metadata_inference_backup"}


@pytest.mark.parametrize("name", _WITHOUT_COUNTERPART)
def test_what_has_no_counterpart_is_refused_in_a_sentence(name: str) -> None:
    assert (
        (name in SINCE_2_14 and torch.__version__ < "2.14")
        or hasattr(torch_stage._PipelineStageBase, name)
        or any(hasattr(kind, name) for kind in (torch_stage.PipelineStage, torch_stage._PipelineStage))
    )
    with pytest.raises(PipelineUsageError, match=rf"has no {name}\(\): \w+ .* \w+"):
        getattr(FakeStage(0, 1), name)(1, two=2)
    assert not hasattr(PipelineStage, name) and not hasattr(FakeStage(0, 1), name)


def test_every_method_of_torchs_stages_is_here() -> None:
    for theirs, ours in (
        (torch_stage._PipelineStageBase, pp_runtime.stage._PipelineStageBase),
        (torch_stage.PipelineStage, PipelineStage),
    ):
        methods = [name for name, value in vars(theirs).items() if callable(value)]
        assert [name for name in methods if not hasattr(ours, name) and name not in _WITHOUT_COUNTERPART] == []


def test_programs_that_look_for_the_preparations_find_both() -> None:
    assert FakeStage(0, 1)._prepare_backward_infra(2, loss_fn=None, target=None) is None
    assert callable(PipelineStage._prepare_forward_infra)


def _peers(rank: int) -> list[Any]:
    import torch.distributed as dist

    group = dist.new_group([2, 1])
    if rank == 0:
        return []
    stage = PipelineStage(nn.Linear(1, 1), dist.get_rank(group), 2, torch.device("cpu"), group=group)
    return [stage._resolve_peer_global_rank(0), stage._resolve_peer_global_rank(1), stage._is_same_rank(0)]


def test_peers_are_named_by_their_global_rank() -> None:
    assert ranks.run(_peers, 3) == [[], [1, 2, True], [1, 2, False]]


def test_a_microbatch_that_does_not_exist_is_refused() -> None:
    stage = FakeStage(0, 1)
    stage.chunks = 2
    stage._check_chunk_id(1)
    with pytest.raises(PipelineUsageError, match="no microbatch 2: they are 0 to 1"):
        stage._check_chunk_id(2)


@pytest.mark.parametrize("output", [torch.ones(1), (1, 2), [torch.ones(1)], {"a": 1}, None])
def test_outputs_become_tuples_as_torchs(output: Any) -> None:
    assert _normalize_model_output_as_tuple(output) == torch_stage._normalize_model_output_as_tuple(output)


def _own_messages(rank: int) -> list[float]:
    import torch.distributed as dist

    sent, received = torch.full((2,), float(rank)), [torch.zeros(2) for _ in range(3)]
    other = 1 - rank
    send, receive = dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received[0], other)
    _wait_batch_p2p(_batch_p2p([send, receive], desc="both ways"))
    one_way = [send] if rank == 0 else [dist.P2POp(dist.irecv, received[1], other)]
    _wait_batch_p2p(_batch_p2p(one_way))
    works = _sorted_batch_p2p([send, dist.P2POp(dist.irecv, received[2], other)])
    assert list(works) == [other] and _batch_p2p([]) == [] and _sorted_batch_p2p([]) == {}
    _wait_batch_p2p(works[other])
    return [float(tensor.sum()) for tensor in received]


def test_programs_may_start_messages_of_their_own() -> None:
    assert ranks.run(_own_messages, 2) == [[2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]


def test_a_stage_says_whether_programs_are_to_check_more() -> None:
    stage = FakeStage(0, 1)
    assert stage._runtime_validate is (torch.distributed.get_debug_level() == torch.distributed.DebugLevel.DETAIL)
    stage._runtime_validate = True
    assert stage._runtime_validate
