"""What data parallelism adds to an order: gather weights before use, free them after, reduce gradients at the end.

compute only            0F0 0F1 1F0 1F1 1B0 ... 0B1
with insert_unshard     0UNSHARD 1UNSHARD 0F0 0F1 1F0 1F1 1B0 ... 0B1 0RESHARD 1RESHARD
with reduce_grad        0F0 0F1 1F0 1F1 1B0 1B1 1REDUCE_GRAD 0B0 0B1 0REDUCE_GRAD
"""

from __future__ import annotations

from collections.abc import Sequence

from pp_runtime.orders import Action, Order, ir


def insert_reduce_grad(order: Order) -> Order:
    """A REDUCE_GRAD after the last B or W of each stage that has none."""
    return {rank: _reduce_after_last_backward(actions) for rank, actions in order.items()}


def _reduce_after_last_backward(actions: Sequence[Action]) -> list[Action]:
    last: dict[int, int] = {}  # stage -> position, last position first
    reduced = {action[0] for action in actions if action[1] is ir.REDUCE_GRAD}
    for position in range(len(actions) - 1, -1, -1):
        action = actions[position]
        for stage, kind, _, _ in reversed(action[3] or (action,)):
            if (kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_WEIGHT) and stage not in last and stage not in reduced:
                last[stage] = position
    result: list[Action] = []
    start = 0
    for stage, position in reversed(last.items()):
        result += actions[start : position + 1]
        result.append(Action(stage, ir.REDUCE_GRAD))
        start = position + 1
    return result + list(actions[start:])


def insert_unshard(order: Order, max_active_stages: int = 3) -> Order:
    """UNSHARD and RESHARD around the use of each stage's weights.

    Before each action the rank gathers the next ``max_active_stages`` stages that it will use, and frees the others:
    gathering runs ahead of use, and no more stages than these are whole at a time.
    """
    if max_active_stages < 1:
        raise ValueError(f"max_active_stages is {max_active_stages}; a rank needs at least 1 gathered stage.")
    return {rank: _unshard_ahead(actions, max_active_stages) for rank, actions in order.items()}


def _unshard_ahead(actions: Sequence[Action], max_active_stages: int) -> list[Action]:
    wanted = _next_stages(actions, max_active_stages)
    active: set[int] = set()
    result: list[Action] = []
    previous: tuple[int, ...] = ()
    for action, following in zip(actions, wanted, strict=True):
        if following != previous:
            previous = following
            for stage in [stage for stage in active if stage not in following]:
                active.remove(stage)
                result.append(Action(stage, ir.RESHARD))
            for stage in following:
                if stage not in active:
                    active.add(stage)
                    result.append(Action(stage, ir.UNSHARD))
        result.append(action)
    return result + [Action(stage, ir.RESHARD) for stage in active]


def _next_stages(actions: Sequence[Action], count: int) -> list[tuple[int, ...]]:
    """For each action, the first ``count`` stages that it and those after it use, in order of use.

    The stages of one OVERLAP_F_B come together, so there may be one more.
    """
    upcoming: list[tuple[int, int]] = []  # (position of next use, stage), soonest first
    result: list[tuple[int, ...]] = []
    for position in range(len(actions) - 1, -1, -1):
        action = actions[position]
        used: list[int] = []
        for part in action[3] or (action,):
            if part[0] not in used:
                used.append(part[0])
        if [entry[1] for entry in upcoming[: len(used)]] == used:
            upcoming[: len(used)] = [(position, stage) for stage in used]
        else:
            upcoming = [(position, stage) for stage in used] + [entry for entry in upcoming if entry[1] not in used]
        end = count
        while end < len(upcoming) and upcoming[end][0] == upcoming[end - 1][0]:
            end += 1
        result.append(tuple([entry[1] for entry in upcoming[:end]]))
    result.reverse()
    return result
