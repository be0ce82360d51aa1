"""Schedule classes by name."""

from __future__ import annotations

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.schedules.auto_schedule import ScheduleAuto
from pp_runtime.schedules.base import _PipelineSchedule
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
)
from pp_runtime.schedules.single import PipelineScheduleSingle

SCHEDULE_CLASSES: dict[str, type[_PipelineSchedule]] = {
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "GPipe": ScheduleGPipe,
    "LoopedBFS": ScheduleLoopedBFS,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "PipelineScheduleSingle": PipelineScheduleSingle,
    "PipelineScheduleMulti": PipelineScheduleMulti,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
    "ZB1P": ScheduleZB1P,
    "ZB2P": ScheduleZB2P,
    "VHalf": ScheduleVHalf,
    "VMin": ScheduleVMin,
    "Auto": ScheduleAuto,
}

_LOWERCASE = {name.lower(): schedule for name, schedule in SCHEDULE_CLASSES.items()}


def get_schedule_class(schedule_name: str) -> type[_PipelineSchedule]:
    """The schedule class with this name, in any case. ValueError for an unknown name lists the known ones."""
    if not isinstance(schedule_name, str):
        raise PipelineTypeError(f"a schedule's name is a str, got {type(schedule_name).__name__}")
    schedule = _LOWERCASE.get(schedule_name.lower())
    if schedule is None:
        raise PipelineUsageError(
            f"Unknown schedule name '{schedule_name}'. The valid options are {list(SCHEDULE_CLASSES)}"
        )
    return schedule
