"""What a schedule refuses about its own arguments, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pp_runtime.errors import PipelineModeError, PipelineTypeError, PipelineUsageError
from pp_runtime.stage import _PipelineStageBase


def check_microbatch_count(count: Any) -> int:
    """``count`` as an int of at least 1."""
    if isinstance(count, bool) or not hasattr(type(count), "__index__"):
        raise PipelineTypeError(f"n_microbatches must be an int, got {count!r} of type {type(count).__name__}")
    if int(count) < 1:
        raise PipelineUsageError(f"n_microbatches must be at least 1, got {count}")
    return int(count)


def check_loss_function(loss_fn: Any) -> Callable[..., Any] | None:
    """``loss_fn`` if it can be called, or None."""
    if loss_fn is not None and not callable(loss_fn):
        raise PipelineTypeError(
            f"loss_fn must be a function of (output, target), or None for a pipeline without backward; "
            f"got {loss_fn!r} of type {type(loss_fn).__name__}"
        )
    return loss_fn


def check_chunk_spec(spec: Any, name: str, kinds: tuple[type, ...], example: str) -> Any:
    """``spec`` if it has one of the container types, or None."""
    if spec is not None and not isinstance(spec, kinds):
        raise PipelineTypeError(f"{name} must be like {example}, got {spec!r} of type {type(spec).__name__}")
    return spec


def check_stage(stage: Any) -> _PipelineStageBase:
    """``stage`` if it is a stage of ours."""
    if isinstance(stage, _PipelineStageBase):
        stage.replaced(in_step=False)  # refuses what would be passed over
        return stage
    if isinstance(stage, (list, tuple)):
        raise PipelineTypeError(
            f"this schedule takes one stage, got a {type(stage).__name__} of {len(stage)}: pass the stage itself, "
            "or use a schedule for several stages a rank, such as ScheduleInterleaved1F1B"
        )
    where = f"{type(stage).__module__}.{type(stage).__qualname__}"
    hint = (
        "import PipelineStage and pipeline from pp_runtime instead of torch.distributed.pipelining"
        if where.startswith("torch.distributed.pipelining")
        else "make it with pp_runtime.PipelineStage or Pipe.build_stage"
    )
    raise PipelineTypeError(f"a schedule's stage must be a pp_runtime stage, got {where}: {hint}")


def check_stages(stages: Any) -> list[_PipelineStageBase]:
    """``stages`` as a list of distinct stages of one pipeline."""
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        raise PipelineTypeError(
            f"this schedule takes a list of stages, got {type(stages).__name__}: pass [stage] for one stage"
        )
    if not stages:
        raise PipelineUsageError("this schedule needs at least one stage on every rank, got an empty list")
    checked = [check_stage(stage) for stage in stages]
    first = checked[0]
    seen: set[int] = set()
    for stage in checked:
        # Planners make schedules of stages that only say how many stages and ranks there are.
        index, first_index = getattr(stage, "stage_index", None), getattr(first, "stage_index", None)
        if index in seen:
            raise PipelineUsageError(f"stage {index} is in the list twice: give each stage its own index")
        if index is not None:
            seen.add(index)
        if stage.num_stages != first.num_stages:
            raise PipelineUsageError(
                f"stage {index} says num_stages={stage.num_stages} but stage {first_index} says "
                f"{first.num_stages}: make all stages with the same num_stages"
            )
        if (stage.group_rank, stage.group_size) != (first.group_rank, first.group_size):
            raise PipelineUsageError(
                f"stage {index} is rank {stage.group_rank} of {stage.group_size} in its group but stage "
                f"{first_index} is rank {first.group_rank} of {first.group_size}: make all with the same group"
            )
    return checked


def check_stages_can_run(stages: Sequence[_PipelineStageBase]) -> None:
    """An error if a stage was made without the constructor of its base: it has an order, but nothing to run."""
    for stage in stages:
        if not hasattr(stage, "_core"):
            raise PipelineModeError(
                f"this schedule can be planned and not run: its {type(stage).__name__} was made without calling "
                "super().__init__(submodule, stage_index, num_stages, device), which step() needs"
            )
