"""The methods of torch's stages that make, describe or move messages: what is left of them where the runtime does."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

import torch.distributed as dist

from pp_runtime.errors import PipelineModeError, PipelineNameError, PipelineUsageError
from pp_runtime.running.held_stage import HeldStage


class TorchStageNames(HeldStage):
    """What a stage has because torch's stages have it.

    What it lacks is missing also to ``hasattr``, by which programs tell one torch from another.
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name in _WITHOUT_COUNTERPART:
            raise PipelineNameError(f"a pp_runtime stage has no {name}(): {_WITHOUT_COUNTERPART[name]}")
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    @cached_property
    def _runtime_validate(self) -> bool:
        """For programs that check more where torch does, with TORCH_DISTRIBUTED_DEBUG=DETAIL."""
        return dist.get_debug_level() == dist.DebugLevel.DETAIL

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing: when a custom function runs in a step, the runtime has received what it reads."""
        return self._none_inside_a_step("get_fwd_recv_ops")

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing: when a custom function runs in a step, the runtime has received what it reads."""
        return self._none_inside_a_step("get_bwd_recv_ops")

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing: the runtime sends what a custom function made in a step, after it."""
        return self._none_inside_a_step("get_fwd_send_ops")

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Nothing: the runtime sends what a custom function made in a step, after it."""
        return self._none_inside_a_step("get_bwd_send_ops")

    def _none_inside_a_step(self, name: str) -> list[dist.P2POp]:
        if self._inside_step:
            return []
        raise PipelineModeError(
            f"{name}() was called outside of a step: only in a custom function of a schedule's step does the runtime "
            "move the messages. Run the stage with a schedule, or move them yourself, with set_local_fwd_input, "
            "get_local_bwd_output and set_local_bwd_input at both ends"
        )

    def _prepare_backward_infra(self, num_microbatches: int, *_args: Any, **_kwargs: Any) -> None:
        """For programs that call a stage without a schedule: ``_prepare_forward_infra`` has made all the room."""

    def _check_chunk_id(self, chunk_id: int) -> None:
        if self.chunks is not None and not 0 <= chunk_id < self.chunks:
            raise PipelineUsageError(f"there is no microbatch {chunk_id}: they are 0 to {self.chunks - 1}")

    def _is_same_rank(self, other_stage: int) -> bool:
        return self.stage_index_to_group_rank[other_stage] == self.group_rank

    def _resolve_peer_global_rank(self, stage_idx: int) -> int:
        rank = self.stage_index_to_group_rank[stage_idx]
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


_MESSAGES = "messages describe themselves and the runtime moves them, so there is nothing to set up"
_INFERENCE = "no shape is inferred before a step, since messages describe themselves"
_INPUTS = "forward_one_chunk and backward_one_chunk take what was received themselves: call those"
_WITHOUT_COUNTERPART = {
    "_create_act_recv_info": _MESSAGES,
    "_create_act_send_info": _MESSAGES,
    "_create_grad_recv_info": _MESSAGES,
    "_create_grad_send_info": _MESSAGES,
    "_get_grad_send_meta": _MESSAGES,
    "_get_init_p2p_neighbors_ops": _MESSAGES,
    "_get_recv_ops": _MESSAGES,
    "_recv_meta": _MESSAGES,
    "_send_meta": _MESSAGES,
    "_setup_backward_recv_info": _MESSAGES,
    "_setup_forward_recv_info": _MESSAGES,
    "_setup_forward_send_info": _MESSAGES,
    "_warmup_backward_result": _MESSAGES,
    "_warmup_forward_vote": _MESSAGES,
    "_backward_metadata_inference": _INFERENCE,
    "_compute_input_grads": _INFERENCE,
    "_compute_outputs": _INFERENCE,
    "_forward_metadata_inference": _INFERENCE,
    "_ones_from_metadata": _INFERENCE,
    "_post_metadata_inference_cleanup": _INFERENCE,
    "_pre_metadata_inference_backup": _INFERENCE,
    "_to_tensor": _INFERENCE,
    "_validate_inferred_metadata": _INFERENCE,
    "_validate_stage_tensors": _INFERENCE,
    "_map_tensor_from_recv_info": _INPUTS,
}
