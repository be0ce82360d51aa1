"""Receives as late as they can stand: a receive that waits early keeps its rank from other work."""

from __future__ import annotations

from collections.abc import Sequence

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, Order, ir

_RECEIVE_OF: dict[ActionType, ActionType] = {
    ir.FORWARD: ir.RECV_F,
    ir.FULL_BACKWARD: ir.RECV_B,
    ir.BACKWARD_INPUT: ir.RECV_B,
}


def defer_receives(order_with_comms: Order) -> Order:
    """The order with each receive moved to right before its consumer.

    The receives of a stage and direction keep their sequence, which is that of the sends: one that stands before a
    wanted receive goes with it. Raises InvalidOrderError for a receive that no action of its rank consumes.
    """
    return {rank: _defer(rank, actions) for rank, actions in order_with_comms.items()}


def _defer(rank: int, actions: Sequence[Action]) -> list[Action]:
    held: dict[tuple[int, ActionType], list[Action]] = {}
    result: list[Action] = []
    for action in actions:
        stage, kind, _, parts = action
        if kind is ir.RECV_F or kind is ir.RECV_B:
            held.setdefault((stage, kind), []).append(action)
            continue
        for part_stage, part_kind, microbatch, _ in parts or (action,):
            receive_kind = _RECEIVE_OF.get(part_kind)
            waiting = held.get((part_stage, receive_kind)) if receive_kind else None
            if waiting:
                wanted = (part_stage, receive_kind, microbatch, None)
                if wanted in waiting:
                    upto = waiting.index(wanted) + 1
                    result += waiting[:upto]
                    del waiting[:upto]
        result.append(action)
    for waiting in held.values():
        if waiting:
            raise InvalidOrderError(f"Rank {rank}: nothing on this rank consumes what {waiting[0]} receives.")
    return result
