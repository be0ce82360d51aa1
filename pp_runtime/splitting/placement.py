"""Which stages a rank holds, by the schedule that will run them."""

from __future__ import annotations

import os
from pathlib import Path

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.orders import ORDERS, SCHEDULE_NAMES, from_torch_form, load_order, looped, placement_of, schedule_name
from pp_runtime.orders import stages_of_rank as held_by

_ANY_NUMBER = 2  # of stages a rank, where a schedule takes any and none is asked for


def stages_of_rank(
    schedule: str | type | os.PathLike[str], rank: int, ranks: int, num_stages: int | None = None
) -> list[int]:
    """The stages that a rank holds, lowest first.

    Args:
        schedule: the name of a schedule, in any case, or its class; "Auto" is looped; or the path of a CSV file with an
            order (a path object, or a text that ends in ``.csv``), whose own stages count.
        num_stages: how many there are in all. If not given, as many a rank as the schedule takes, and two where it
            takes any number.

    Raises PipelineUsageError for a schedule that there is not, and for counts that it does not allow.
    """
    if not 0 <= rank < ranks:
        raise PipelineUsageError(f"there is no rank {rank} of {ranks}: they are 0 to {ranks - 1}")
    if isinstance(schedule, os.PathLike) or (isinstance(schedule, str) and schedule.endswith(".csv")):
        return _stages_in_file(Path(schedule), rank, ranks, num_stages)
    given = schedule.__name__.removeprefix("Schedule") if isinstance(schedule, type) else schedule
    if not isinstance(given, str):
        raise PipelineTypeError(f"a schedule is a name, a class or the path of a CSV file, not {schedule!r}")
    name = schedule_name(given)
    if name is None:
        raise PipelineUsageError(f"there is no schedule {given!r}; there are {', '.join(SCHEDULE_NAMES)}")
    spec = ORDERS.get(name)  # Auto has none
    allowed = None if spec is None else spec.stages_per_rank_allowed
    if num_stages is None:
        num_stages = ranks * (allowed[0] if allowed else _ANY_NUMBER)
    per_rank, left = divmod(num_stages, ranks)
    if left or not per_rank or (allowed is not None and per_rank not in allowed):
        takes = "equally many on each rank" if allowed is None else f"{' or '.join(map(str, allowed))} a rank"
        raise PipelineUsageError(f"{name} takes {takes}, and {num_stages} stages on {ranks} ranks are not")
    placement = looped if spec is None else spec.placement
    return held_by(placement(ranks, num_stages), rank)


def _stages_in_file(path: Path, rank: int, ranks: int, num_stages: int | None) -> list[int]:
    order = from_torch_form(load_order(path))
    placement = placement_of(order)
    if len(order) != ranks or num_stages not in (None, len(placement)):
        asked = f"{ranks} ranks" + ("" if num_stages is None else f" and {num_stages} stages")
        raise PipelineUsageError(
            f"{path} is an order for {len(order)} ranks and {len(placement)} stages, not for {asked}"
        )
    return held_by(placement, rank)
