"""Writing down the actions of a rank that holds two stages of a V, one on the way down and one on the way up."""

from __future__ import annotations

from collections import Counter

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action, ActionType, Order

Kind = tuple[int, ActionType]
"""A stage and what is done for its next microbatch."""


class ChunkActions:
    """A rank's actions so far; every kind of action goes through the microbatches in turn."""

    def __init__(self, down: int, up: int) -> None:
        self.down = down
        self.up = up
        self.actions: list[Action] = []
        self._next: Counter[Kind] = Counter()

    def count(self, stage: int, kind: ActionType) -> int:
        """How many microbatches have had this."""
        return self._next[stage, kind]

    def add(self, times: int, *kinds: Kind) -> None:
        """Append the kinds one after the other, ``times`` times over."""
        following, actions = self._next, self.actions
        for _ in range(times):
            for kind in kinds:
                microbatch = following[kind]
                following[kind] = microbatch + 1
                actions.append(Action(kind[0], kind[1], microbatch))


def without_surplus(order: Order, num_microbatches: int) -> Order:
    """The order without the microbatches that are too many. What is left keeps its sequence, so it stays right."""
    return {
        rank: [kept for action in actions if (kept := _kept(action, num_microbatches))]
        for rank, actions in order.items()
    }


def _kept(action: Action, num_microbatches: int) -> Action | None:
    if action.sub_actions is None:
        return action if (action.microbatch_index or 0) < num_microbatches else None
    parts = tuple(part for part in action.sub_actions if (part.microbatch_index or 0) < num_microbatches)
    if len(parts) > 1:
        return Action(-1, ir.OVERLAP_F_B, None, parts)
    return parts[0] if parts else None
