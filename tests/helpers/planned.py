"""Schedules of stages that only say how many stages and ranks there are, as planners and PyTorch's tests make them."""

from __future__ import annotations

from typing import Any

from pp_runtime import PipelineStage, get_schedule_class
from pp_runtime.schedules import PipelineScheduleSingle
from pp_runtime.schedules.registry import SCHEDULE_CLASSES
from pp_runtime.stage import _PipelineStageBase

NAMED = [name for name in SCHEDULE_CLASSES if not name.startswith("PipelineSchedule")]


class MockPipelineStage(_PipelineStageBase):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.submod = None  # type: ignore[assignment]
        self.num_stages = kwargs.get("num_stages", 1)
        self.group_size = kwargs.get("group_size", 1)
        self.group_rank = kwargs.get("group_rank", 0)
        self.group = kwargs.get("group")

    def _create_grad_recv_info(self, *args: Any, **kwargs: Any) -> None:
        return None


class MockOfThePublicStage(PipelineStage):
    __init__ = MockPipelineStage.__init__


def plan(name: str, ranks: int, microbatches: int, kind: Any = MockPipelineStage, rank: int = 0) -> Any:
    schedule_class = get_schedule_class(name)
    single = issubclass(schedule_class, PipelineScheduleSingle)
    per_rank = 1 if single else 2
    stages = [kind(group_size=ranks, num_stages=ranks * per_rank, group_rank=rank) for _ in range(per_rank)]
    return schedule_class(stages[0] if single else stages, microbatches)
