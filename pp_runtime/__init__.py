"""Pipeline-parallel training with the API of torch.distributed.pipelining on a planned C++ runtime.

The names are those of torch.distributed.pipelining, so a program changes its imports and nothing else::

    from pp_runtime import PipelineStage, Schedule1F1B

    stage = PipelineStage(module, rank, num_stages, device)
    schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)
    schedule.step(x)  # on the rank of the first stage
    schedule.step(target=y, losses=losses)  # on the rank of the last
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pp_runtime._extension import check_extension
from pp_runtime._torchs_place import stand_in_torchs_place
from pp_runtime._version import __version__

check_extension()
stand_in_torchs_place()

from pp_runtime.errors import InvalidOrderError, PipelineError, PipelineUsageError  # noqa: E402
from pp_runtime.running import PipelineGradScaler, PipelineMetrics, StepMetrics, clip_grad_norm_  # noqa: E402
from pp_runtime.schedules import (  # noqa: E402
    Schedule1F1B,
    ScheduleAuto,
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
    get_schedule_class,
)
from pp_runtime.stage import PipelineStage, build_stage  # noqa: E402

if TYPE_CHECKING:
    from pp_runtime.advising import Advice, DeviceSpeed, LinkSpeed, advise
    from pp_runtime.building import BuiltPipeline, build_pipeline
    from pp_runtime.recording import RunRecord
    from pp_runtime.splitting import (
        Partition,
        Pipe,
        SplitPoint,
        Weights,
        layer_costs,
        layer_modules,
        layer_stages,
        load_weights,
        open_weights,
        partition,
        pipe_split,
        pipeline,
        stages_of_rank,
        without_weights,
    )

__all__ = [
    "Advice",
    "BuiltPipeline",
    "DeviceSpeed",
    "InvalidOrderError",
    "LinkSpeed",
    "Partition",
    "Pipe",
    "PipelineError",
    "PipelineGradScaler",
    "PipelineMetrics",
    "PipelineStage",
    "PipelineUsageError",
    "RunRecord",
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
    "SplitPoint",
    "StepMetrics",
    "Weights",
    "__version__",
    "_ScheduleForwardOnly",
    "advise",
    "build_pipeline",
    "build_stage",
    "clip_grad_norm_",
    "get_schedule_class",
    "layer_costs",
    "layer_modules",
    "layer_stages",
    "load_weights",
    "open_weights",
    "partition",
    "pipe_split",
    "pipeline",
    "stages_of_rank",
    "without_weights",
]


# The rest is fetched when first used: the tracer needs torch.distributed.pipelining, whose import takes a while.
def __getattr__(name: str) -> Any:
    if name in ("BuiltPipeline", "build_pipeline"):
        from pp_runtime import building

        return getattr(building, name)
    if name in ("Advice", "DeviceSpeed", "LinkSpeed", "advise"):
        from pp_runtime import advising

        return getattr(advising, name)
    if name == "RunRecord":
        from pp_runtime.recording import RunRecord

        return RunRecord
    if name in __all__:
        from pp_runtime import splitting

        return getattr(splitting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
