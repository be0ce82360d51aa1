"""The schedule that runs any order: torch's ``_PipelineScheduleRuntime``, and what its custom functions expect."""

from __future__ import annotations

from typing import Any

from pp_runtime.orders import FileFormat
from pp_runtime.schedules.multi import PipelineScheduleMulti
from pp_runtime.schedules.order_holder import TorchOrder
from pp_runtime.schedules.torch_forms import _simulate_comms_compute


class _AllDone(dict):
    """What torch keeps for work in flight, where there never is any.

    When a custom function runs, the runtime has received its inputs and gathered its weights, so whatever it asks for
    is there and nothing is left to wait for.
    """

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> list[Any]:
        return []

    def pop(self, key: Any, *default: Any) -> list[Any]:
        return []


class _PipelineScheduleRuntime(PipelineScheduleMulti):
    """Runs an order that is loaded from a file, assigned, or made by a subclass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Receives are always waited for right before use; this only changes where the shown order has them.
        self._defer_pp_recv = bool(kwargs.pop("defer_pp_recv", False))
        self.fwd_recv_ops = _AllDone()
        self.bwd_recv_ops = _AllDone()
        self.unshard_ops = _AllDone()
        super().__init__(*args, **kwargs)

    def _dump_csv(self, filename: str, format: FileFormat = "compute_comms") -> None:
        super()._dump_csv(filename, format)

    @property
    def unsharded_stages(self) -> set[int]:
        """For custom functions: the stages whose weights are whole."""
        return {stage.stage_index for stage in self._stages}

    def _assert_unsharded(self, stage: Any) -> None:
        """For custom functions: the runtime has waited for the stage's weights before it calls one."""

    def _prepare_schedule_with_comms(self, actions: TorchOrder, format: FileFormat = "compute_only") -> None:
        """Take an order that is made in memory, and check it."""
        self._take_order(actions, format)

    def _simulate(self) -> TorchOrder:
        """The order with its sends and receives step by step, every action taking one."""
        return _simulate_comms_compute(
            self.pipeline_order_with_comms, self.stage_index_to_group_rank.__getitem__, self._num_stages
        )
