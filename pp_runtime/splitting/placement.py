"""Which stages a rank holds, by the schedule that will run them."""

from __future__ import annotations

import os
from pathlib import Path

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.orders import ORDERS, leaves, load_order, looped
from pp_runtime.orders import stages_of_rank as held_by

_ANY_NUMBER = 2  # of stages a rank, where a schedule takes any and none is asked for
_LOWERCASE = {name.lower(): name for name in ORDERS}


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
    name = schedule.__name__.removeprefix("Schedule") if isinstance(schedule, type) else schedule
    if not isinstance(name, str):
        raise PipelineTypeError(f"a schedule is a name, a class or the path of a CSV file, not {schedule!r}")
    spec = ORDERS.get(_LOWERCASE.get(name.lower(), ""))
    if spec is None and name.lower() != "auto":
        raise PipelineUsageError(f"there is no schedule {name!r}; there are {', '.join([*ORDERS, 'Auto'])}")
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
    order = load_order(path)
    stages = {
        each: sorted({part[0] for action in actions if action is not None for part in leaves([action])})
        for each, actions in order.items()
    }
    count = 1 + max((max(held) for held in stages.values() if held), default=-1)
    if len(order) != ranks or (num_stages is not None and num_stages != count):
        asked = f"{ranks} ranks" + ("" if num_stages is None else f" and {num_stages} stages")
        raise PipelineUsageError(f"{path} is an order for {len(order)} ranks and {count} stages, not for {asked}")
    return stages[rank]
