"""Schedules with one stage a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pp_runtime.errors import PipelineUsageError
from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.orders import Action, Order
from pp_runtime.planning import insert_reduce_grad
from pp_runtime.schedules.base import _PipelineSchedule
from pp_runtime.schedules.checks import check_stage
from pp_runtime.schedules.order_holder import TorchOrder
from pp_runtime.stage import _PipelineStageBase


class PipelineScheduleSingle(_PipelineSchedule):
    """Base of the schedules with one stage a rank: stage ``i`` on rank ``i`` of its group.

    With ``scale_grads`` the gradients are divided by the number of microbatches after the backward, which suits a
    loss function that averages; turn it off for one that sums.

    ``target_chunk_spec`` says how targets are cut, as the other specs do for inputs: in the structure of the target, or
    one spec for all its tensors. None cuts along dimension 0.
    """

    def __init__(
        self,
        stage: _PipelineStageBase,
        n_microbatches: int,
        loss_fn: Callable | None = None,
        args_chunk_spec: tuple[TensorChunkSpec, ...] | None = None,
        kwargs_chunk_spec: dict[str, TensorChunkSpec] | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        scale_grads: bool = True,
        *,
        target_chunk_spec: Any = None,
    ) -> None:
        chunks = args_chunk_spec, kwargs_chunk_spec, output_merge_spec
        super().__init__(n_microbatches, loss_fn, *chunks, scale_grads, target_chunk_spec=target_chunk_spec)
        self._stage = check_stage(stage)
        self._num_stages = stage.num_stages
        self._check_one_stage_a_rank()
        brings_own = type(self)._get_pipeline_order is not PipelineScheduleSingle._get_pipeline_order
        if not self._take_own_order() and brings_own:
            self.pipeline_order = self._get_pipeline_order() or {}

    def _check_one_stage_a_rank(self) -> None:
        ranks = self._stage.group_size
        if self._num_stages != ranks:
            raise PipelineUsageError(
                f"{type(self).__name__} holds one stage a rank, but there are {self._num_stages} stages for {ranks} "
                f"ranks: split the model into {ranks} stages, or use a schedule for several stages a rank, such as "
                "ScheduleInterleaved1F1B"
            )

    @property
    def _stages(self) -> list[_PipelineStageBase]:  # type: ignore[override]
        return [self._stage]

    def _get_pipeline_order(self) -> dict[int, list[Action | None]] | None:
        """The order in torch's form. A subclass that overrides this brings its own order."""
        return self.pipeline_order

    def _torch_form(self, order: Order) -> TorchOrder:
        # torch shows these orders with their gradient reductions and without idle steps.
        return {rank: list(actions) for rank, actions in insert_reduce_grad(order).items()}
