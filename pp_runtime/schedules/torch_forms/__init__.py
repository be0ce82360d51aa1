"""torch's names for looking at orders and passes, with torch's call forms and results."""

from __future__ import annotations

from pp_runtime.schedules.torch_forms.names import (
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
from pp_runtime.schedules.torch_forms.passes import (
    _add_reduce_grad,
    _add_send_recv,
    _add_unshard_reshard,
    _defer_recv_ops,
    _merge_bw,
    _requires_reduce_grad,
    _validate_schedule,
    proved_placement,
)
from pp_runtime.schedules.torch_forms.steps import (
    _dump_chrometrace,
    _format_pipeline_order,
    _get_profiler_function_name,
    _simulate_comms_compute,
)

__all__ = [
    "B",
    "F",
    "I",
    "W",
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
    "proved_placement",
]
