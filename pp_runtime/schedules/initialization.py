"""torch's flags and calls around the inference of shapes before a step; nothing is inferred here."""

from __future__ import annotations

from typing import Any

from pp_runtime.schedules.fields import ScheduleFields


class StageInitialization(ScheduleFields):
    """Flags that programs read, and reset when lengths change: any step may have lengths of its own."""

    _stage_initialized = False
    _stage_forward_initialized = False
    _stage_backward_initialized = False
    _stages_initialized = False
    _stages_forward_initialized = False
    _stages_backward_initialized = False

    def _initialize_stages(self, args: Any, kwargs: Any, target: Any = None, loss_kwargs: Any = None) -> None:
        """Called at the beginning of a step with its first microbatch; of schedules with one stage, ``_stage``."""
        self._initialize_stage(args, kwargs, target, loss_kwargs)

    def _initialize_stage(self, args: Any, kwargs: Any, target: Any = None, loss_kwargs: Any = None) -> None:
        self._stage_initialized = self._stages_initialized = True
        self._stage_forward_initialized = self._stages_forward_initialized = True
        self._stage_backward_initialized = self._stages_backward_initialized = self._has_backward
