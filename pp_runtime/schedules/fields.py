"""What the parts of a schedule share: its stages, its counts and options, and the runtime that it made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.running import Runtime
from pp_runtime.stage import _PipelineStageBase


class ScheduleFields:
    """The names are torch's where torch's schedules have them, since programs read and set them."""

    _order_name: ClassVar[str | None] = None
    _trains: ClassVar[bool] = True

    _stages: list[_PipelineStageBase]
    _n_microbatches: int
    _loss_fn: Callable[..., Any] | None
    _args_chunk_spec: tuple[TensorChunkSpec, ...] | None
    _kwargs_chunk_spec: dict[str, TensorChunkSpec] | None
    _output_merge_spec: dict[str, Any] | tuple[Any] | None
    # In the structure of the target, or one spec for all of it; None cuts along dimension 0.
    _target_chunk_spec: Any
    _has_backward: bool
    _backward_requires_autograd: bool = True
    _defer_pp_recv: bool = False

    # None until the first step, and once the order, a handler or a failure made another one necessary.
    _runtime: Runtime | None = None

    def _last_stage(self) -> _PipelineStageBase | None:
        """This rank's last stage of the whole pipeline, if it has it."""
        return next((stage for stage in self._stages if stage.is_last), None)
