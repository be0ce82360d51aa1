"""An I directly followed by its own W becomes a B, which costs less than the two halves."""

from __future__ import annotations

from collections.abc import Sequence

from pp_runtime.orders import Action, Order, ir


def merge_split_backward(order: Order) -> Order:
    """The order with every adjacent I and W of one stage and microbatch as a B."""
    return {rank: _merge(actions) for rank, actions in order.items()}


def _merge(actions: Sequence[Action]) -> list[Action]:
    result: list[Action] = []
    for action in actions:
        stage, kind, microbatch, _ = action
        if kind is ir.BACKWARD_WEIGHT and result and result[-1] == (stage, ir.BACKWARD_INPUT, microbatch, None):
            result[-1] = Action(stage, ir.FULL_BACKWARD, microbatch)
        else:
            result.append(action)
    return result
