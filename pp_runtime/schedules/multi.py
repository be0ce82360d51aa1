"""Schedules with any number of stages a rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.orders import Action, from_torch_form, looped, to_torch_form
from pp_runtime.schedules.base import _PipelineSchedule
from pp_runtime.schedules.checks import check_stages
from pp_runtime.schedules.order_holder import TorchOrder, has_backwards
from pp_runtime.schedules.torch_forms import proved_placement
from pp_runtime.stage import _PipelineStageBase


class PipelineScheduleMulti(_PipelineSchedule):
    """Base of the schedules with several stages a rank; alone, it runs an order from a file.

    A named schedule has its stages looped (stage ``i`` on rank ``i % ranks``) or in a V, as its order says; a file
    says it for itself. ``stage_index_to_group_rank`` tells.

    ``target_chunk_spec`` says how targets are cut, as the other specs do for inputs: in the structure of the target, or
    one spec for all its tensors. None cuts along dimension 0.
    """

    def __init__(
        self,
        stages: list[_PipelineStageBase],
        n_microbatches: int,
        loss_fn: Callable | None = None,
        args_chunk_spec: tuple[TensorChunkSpec, ...] | None = None,
        kwargs_chunk_spec: dict[str, TensorChunkSpec] | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        use_full_backward: bool | None = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
        *,
        target_chunk_spec: Any = None,
    ) -> None:
        chunks = args_chunk_spec, kwargs_chunk_spec, output_merge_spec
        super().__init__(n_microbatches, loss_fn, *chunks, scale_grads, target_chunk_spec=target_chunk_spec)
        self._stages = check_stages(stages)
        self._num_stages = self.num_stages = self._stages[0].num_stages
        self.n_local_stages = len(self._stages)
        self.pp_group_size = self._stages[0].group_size
        self.rank = self._stages[0].group_rank
        # A custom backward may do without autograd, and then step() may run under no_grad.
        self._backward_requires_autograd = backward_requires_autograd
        if use_full_backward is not None:
            warnings.warn(
                "use_full_backward has no effect: the order says which backwards are split",
                DeprecationWarning,
                stacklevel=2,
            )
        if not self._take_own_order():
            self.stage_index_to_group_rank = dict(enumerate(looped(self.pp_group_size, self._num_stages)))
        elif (
            type(self)._calculate_single_rank_operations is not PipelineScheduleMulti._calculate_single_rank_operations
        ):
            ranks = range(self.pp_group_size)
            self.pipeline_order = {rank: self._calculate_single_rank_operations(rank) for rank in ranks}

    def _calculate_single_rank_operations(self, rank: int) -> list[Action | None]:
        """A rank's compute actions, None where it idles. A named schedule whose subclass overrides this runs those."""
        built = self._build_order()
        return [] if built is None else to_torch_form(built[0])[rank]

    def _validate_and_set_stage_mapping(self, actions: TorchOrder) -> None:
        """Prove an order at once, and take its placement of the stages; the order itself is not taken."""
        forward_only = not has_backwards(from_torch_form(actions).values())
        self._place(
            proved_placement(
                actions, self.pp_group_size, self._num_stages, self._n_microbatches, forward_only=forward_only
            )
        )
