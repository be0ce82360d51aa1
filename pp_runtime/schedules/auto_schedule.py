"""The schedule whose order is searched for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pp_runtime.errors import PipelineUsageError
from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.orders import Order, Placement, looped
from pp_runtime.schedules.runtime_schedule import _PipelineScheduleRuntime

if TYPE_CHECKING:
    from pp_runtime.stage import _PipelineStageBase
    from pp_runtime.timing import Costs


class ScheduleAuto(_PipelineScheduleRuntime):
    """Searches for the shortest order under the given costs and memory.

    ``costs`` are the times of F, I, W, B and transfers, given or measured (:class:`pp_runtime.timing.Costs`); all ranks
    must pass the same ones. ``memory_cap`` is the most activations that a rank may hold at once, None for no cap.
    ``placement[stage]`` is the rank of each stage: looped if not given; ``pp_runtime.orders.v_shaped``
    gives the other common one.
    """

    def __init__(
        self,
        stages: list[_PipelineStageBase],
        n_microbatches: int,
        loss_fn: Callable | None = None,
        args_chunk_spec: tuple[TensorChunkSpec, ...] | None = None,
        kwargs_chunk_spec: dict[str, TensorChunkSpec] | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
        defer_pp_recv: bool = False,
        *,
        costs: Costs | None = None,
        memory_cap: int | None = None,
        placement: Placement | None = None,
        target_chunk_spec: Any = None,
    ) -> None:
        self._costs, self._memory_cap, self._wanted_placement = costs, memory_cap, placement
        super().__init__(
            stages=stages,
            n_microbatches=n_microbatches,
            loss_fn=loss_fn,
            args_chunk_spec=args_chunk_spec,
            kwargs_chunk_spec=kwargs_chunk_spec,
            output_merge_spec=output_merge_spec,
            scale_grads=scale_grads,
            backward_requires_autograd=backward_requires_autograd,
            defer_pp_recv=defer_pp_recv,
            target_chunk_spec=target_chunk_spec,
        )

    def _order_builder(self) -> None:
        """The search takes longer than the order is large, so the order is kept."""

    def _build_order(self) -> tuple[Order, Placement]:
        from pp_runtime.planning import auto

        ranks, stages = self.pp_group_size, self._num_stages
        if self._wanted_placement is None:
            placement = looped(ranks, stages)
        else:
            placement = tuple(self._wanted_placement)
            if len(placement) != stages or set(placement) != set(range(ranks)):
                raise PipelineUsageError(
                    f"placement must give each of {stages} stages one of {ranks} ranks and leave no rank without a "
                    f"stage, got {placement}"
                )
        return auto(ranks, stages, self._n_microbatches, self._costs, self._memory_cap, placement), placement
