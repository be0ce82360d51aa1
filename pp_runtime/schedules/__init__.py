"""Schedules: classes that run a pipeline, and the orders that they run."""

from __future__ import annotations

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
from pp_runtime.schedules.torch_names import (
    _TARGET_CHUNK_SPEC,
    B,
    F,
    I,
    W,
    _batch_p2p,
    _check_torch_compile_compatibility,
    _sorted_batch_p2p,
    _wait_batch_p2p,
)
from pp_runtime.schedules.torch_passes import (
    _add_reduce_grad,
    _add_send_recv,
    _add_unshard_reshard,
    _defer_recv_ops,
    _merge_bw,
    _requires_reduce_grad,
    _validate_schedule,
)
from pp_runtime.schedules.torch_steps import (
    _dump_chrometrace,
    _format_pipeline_order,
    _get_profiler_function_name,
    _simulate_comms_compute,
)

__all__ = [
    "B",
    "BACKWARD_INPUT",
    "BACKWARD_WEIGHT",
    "F",
    "FORWARD",
    "FULL_BACKWARD",
    "I",
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
    "W",
    "_Action",
    "_ComputationType",
    "_CustomFunctionProtocol",
    "_PipelineContext",
    "_PipelineSchedule",
    "_PipelineScheduleRuntime",
    "_ScheduleForwardOnly",
    "_TARGET_CHUNK_SPEC",
    "_add_reduce_grad",
    "_add_send_recv",
    "_add_unshard_reshard",
    "_batch_p2p",
    "_check_torch_compile_compatibility",
    "_defer_recv_ops",
    "_dump_chrometrace",
    "_format_pipeline_order",
    "_get_profiler_function_name",
    "_merge_bw",
    "_requires_reduce_grad",
    "_simulate_comms_compute",
    "_sorted_batch_p2p",
    "_validate_schedule",
    "_wait_batch_p2p",
    "get_schedule_class",
]
