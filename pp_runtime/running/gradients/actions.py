"""What UNSHARD, RESHARD and REDUCE_GRAD do: the calls of a stage's data-parallel adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pp_runtime.orders import Action, ActionType, ir
from pp_runtime.planning import Handler
from pp_runtime.running.held_stage import HeldStage


def data_parallel_handlers(stages: Sequence[HeldStage]) -> dict[ActionType, Handler]:
    """What UNSHARD, RESHARD and REDUCE_GRAD do on stages that are data-parallel when they come."""
    by_index = {stage.stage_index: stage for stage in stages}
    methods = ((ir.UNSHARD, "unshard"), (ir.RESHARD, "reshard"), (ir.REDUCE_GRAD, "reduce_grad"))
    return {kind: _adapter_call(by_index, method) for kind, method in methods}


def _adapter_call(stages: Mapping[int, HeldStage], method: str) -> Handler:
    def call(action: Action) -> None:
        adapter = stages[action.stage_index].adapter()
        if adapter is not None:
            getattr(adapter, method)()

    return call
