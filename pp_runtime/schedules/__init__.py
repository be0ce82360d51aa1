"""Schedules: classes that run a pipeline, and the orders that they run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pp_runtime.ir import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    OVERLAP_F_B,
    RECV_B,
    RECV_F,
    REDUCE_GRAD,
    RESHARD,
    SEND_B,
    SEND_F,
    UNSHARD,
    _Action,
    _ComputationType,
)
from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.schedules.auto_schedule import ScheduleAuto
from pp_runtime.schedules.base import _PipelineSchedule
from pp_runtime.schedules.custom_context import _CustomFunctionProtocol, _PipelineContext
from pp_runtime.schedules.multi import PipelineScheduleMulti
from pp_runtime.schedules.named import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleVHalf,
    ScheduleVMin,
    ScheduleZB1P,
    ScheduleZB2P,
    ScheduleZBVZeroBubble,
    _ScheduleForwardOnly,
)
from pp_runtime.schedules.registry import get_schedule_class
from pp_runtime.schedules.runtime_schedule import _PipelineScheduleRuntime
from pp_runtime.schedules.single import PipelineScheduleSingle

__all__ = [
    "BACKWARD_INPUT",
    "BACKWARD_WEIGHT",
    "FORWARD",
    "FULL_BACKWARD",
    "OVERLAP_F_B",
    "PipelineScheduleMulti",
    "PipelineScheduleSingle",
    "RECV_B",
    "RECV_F",
    "REDUCE_GRAD",
    "RESHARD",
    "SEND_B",
    "SEND_F",
    "Schedule1F1B",
    "ScheduleAuto",
    "ScheduleDualPipeV",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleLoopedBFS",
    "ScheduleVHalf",
    "ScheduleVMin",
    "ScheduleZB1P",
    "ScheduleZB2P",
    "ScheduleZBVZeroBubble",
    "TensorChunkSpec",
    "UNSHARD",
    "_Action",
    "_ComputationType",
    "_CustomFunctionProtocol",
    "_PipelineContext",
    "_PipelineSchedule",
    "_PipelineScheduleRuntime",
    "_ScheduleForwardOnly",
    "_wait_batch_p2p",
    "get_schedule_class",
]


def _wait_batch_p2p(work: Iterable[Any]) -> None:
    """Wait for each of some works, as custom functions do with what they take from ``fwd_recv_ops``."""
    for each in work:
        each.wait()
