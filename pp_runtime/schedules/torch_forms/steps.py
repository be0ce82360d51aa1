"""torch's names for looking at an order step by step: simulated, as a table, as a trace."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, ir, leaves

Rows = Mapping[int, Sequence[Action | None]]


def _get_profiler_function_name(action: Action) -> str:
    """What torch calls an action in a profile."""
    return f"PP:{action}"


def _format_pipeline_order(pipeline_order: Rows, error_step_number: int | None = None) -> str:
    """The order as a table of steps and ranks; a step with an error can be marked."""
    ranks = sorted(pipeline_order)
    steps = list(zip_longest(*(pipeline_order[rank] for rank in ranks)))
    digits = len(str(len(steps) - 1))
    labels = [f"Step {number:0{digits}}" for number in range(len(steps))]
    cells = [["" if action is None else str(action) for action in step] for step in steps]
    least = max(map(len, labels), default=0)
    widths = [max([least, *(len(row[column]) for row in cells)]) for column in range(len(ranks))]

    def line(texts: Sequence[str]) -> str:
        return " ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True))

    lines = [" " * (least + 2) + line([f"Rank {number}" for number in range(len(ranks))])]
    for number, row in enumerate(cells):
        mark = " <-- ERROR HERE" if number == error_step_number else ""
        lines.append(f"{labels[number]}: {line(row)}{mark}")
    return "\n".join(lines) + "\n"


def _simulate_comms_compute(
    pipeline_order: Rows, stage_to_rank: Callable[[int], int], num_stages: int
) -> dict[int, list[Action | None]]:
    """The order with its sends and receives, played with every action taking one step; None where a rank waits.

    In a step each rank, from the first on, does its next action if that can begin; ranks that waited are asked once
    more at its end. :func:`pp_runtime.timing.simulate` plays with real times. InvalidOrderError where nothing moves.
    """
    rows = {rank: [action for action in pipeline_order[rank] if action is not None] for rank in sorted(pipeline_order)}
    played: dict[int, list[Action | None]] = {rank: [] for rank in rows}
    place = {rank: 0 for rank, row in rows.items() if row}
    done: set[Action] = set()

    def next_of(rank: int) -> Action | None:
        """The rank's next action if it can begin; it is then done."""
        action = rows[rank][place[rank]]
        if not all(_can_begin(part, done, stage_to_rank, num_stages) for part in leaves((action,))):
            return None
        done.update((action, *leaves((action,))))
        place[rank] += 1
        return action

    while place:
        working = list(place)
        for rank in working:
            played[rank].append(next_of(rank))
        if all(played[rank][-1] is None for rank in working):
            waiting = ", ".join(f"rank {rank} at {rows[rank][step]}" for rank, step in place.items())
            raise InvalidOrderError(f"The order deadlocks: {waiting}.\n{_format_pipeline_order(played)}")
        place = {rank: step for rank, step in place.items() if step < len(rows[rank])}
        for rank in place:
            if played[rank][-1] is None:
                played[rank][-1] = next_of(rank)
        place = {rank: step for rank, step in place.items() if step < len(rows[rank])}
    return played


def _can_begin(action: Action, done: set[Action], stage_to_rank: Callable[[int], int], num_stages: int) -> bool:
    stage, kind, microbatch, _ = action

    def any_done(other: int, *makers: ActionType) -> bool:
        return any((other, maker, microbatch, None) in done for maker in makers)

    def read_from(other: int, receive: ActionType, *makers: ActionType) -> bool:
        on_this_rank = stage_to_rank(other) == stage_to_rank(stage)
        return any_done(stage, receive) or (on_this_rank and any_done(other, *makers))

    if kind is ir.FORWARD:
        return stage == 0 or read_from(stage - 1, ir.RECV_F, ir.FORWARD)
    if kind in (ir.FULL_BACKWARD, ir.BACKWARD_INPUT):
        return stage == num_stages - 1 or read_from(stage + 1, ir.RECV_B, ir.FULL_BACKWARD, ir.BACKWARD_INPUT)
    if kind is ir.SEND_F:
        return any_done(stage, ir.FORWARD)
    if kind is ir.SEND_B:
        return any_done(stage, ir.FULL_BACKWARD, ir.BACKWARD_INPUT)
    if kind is ir.RECV_F:
        return any_done(stage - 1, ir.SEND_F)
    if kind is ir.RECV_B:
        return any_done(stage + 1, ir.SEND_B)
    return True


def _dump_chrometrace(schedule: Rows, filename: str | os.PathLike[str]) -> None:
    """Write an order as a trace for Chrome or Perfetto, each action one unit long."""
    events = [
        {
            "name": str(action),
            "cat": "computation" if action.is_compute_op else "communication",
            "ph": "X",
            "pid": rank,
            "tid": rank,
            "ts": step,
            "dur": 1,
        }
        for rank in sorted(schedule)
        for step, action in enumerate(schedule[rank])
        if action is not None
    ]
    with open(filename, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events}, file)
