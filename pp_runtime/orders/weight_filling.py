"""Weight gradients moved to where a rank would be idle, without more activations than before.

Nobody waits for a W, so F and I go first whenever they can; a W runs when neither can, or when its activation has to
make room for the next F. This is the last step of Qi et al., "Pipeline Parallelism with Controllable Memory", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action, Order, Placement


def fill_with_weights(order: Order, placement: Placement) -> Order:
    """The order with each rank's F and I in their sequence and its W where they fit best, on a chain of stages.

    F, I and W take one unit of time each; the order must be complete, with every backward split.
    """
    # Per stage and microbatch, the step after which its F and its I are known to the neighbours.
    forwards: set[tuple[int, int | None]] = set()
    inputs: set[tuple[int, int | None]] = set()
    last_stage = len(placement) - 1
    ranks = [_Rank(actions) for actions in order.values()]
    left = sum(map(len, order.values()))
    while left:
        finished: list[Action] = []
        for rank in ranks:
            action = rank.next_of_main()
            if action is not None:
                stage, kind, microbatch, _ = action
                if kind is ir.FORWARD:
                    ready = stage == 0 or (stage - 1, microbatch) in forwards
                else:
                    ready = stage == last_stage or (stage + 1, microbatch) in inputs
                if ready:
                    rank.run_main(action)
                    finished.append(action)
                    left -= 1
                    continue
            left -= rank.run_weight()
        for stage, kind, microbatch, _ in finished:
            (forwards if kind is ir.FORWARD else inputs).add((stage, microbatch))
    return {number: rank.done for number, rank in zip(order, ranks, strict=True)}


class _Rank:
    """A rank's F and I in sequence, its W that are due, and the activations it holds."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self.done: list[Action] = []
        self._main = [action for action in actions if action[1] is not ir.BACKWARD_WEIGHT]
        self._place = 0
        self._due: list[Action] = []
        self._weights_done = 0
        self._held = 0
        self._most = _most_held(actions)

    def next_of_main(self) -> Action | None:
        """The next F or I, unless it is an F for which there is no room."""
        if self._place == len(self._main):
            return None
        action = self._main[self._place]
        return None if action[1] is ir.FORWARD and self._held >= self._most else action

    def run_main(self, action: Action) -> None:
        self._place += 1
        self.done.append(action)
        if action[1] is ir.BACKWARD_INPUT:
            self._due.append(Action(action[0], ir.BACKWARD_WEIGHT, action[2]))
        else:
            self._held += 1

    def run_weight(self) -> bool:
        """Run the oldest W that is due, if there is one."""
        if self._weights_done == len(self._due):
            return False
        self.done.append(self._due[self._weights_done])
        self._weights_done += 1
        self._held -= 1
        return True


def _most_held(actions: Sequence[Action]) -> int:
    held = most = 0
    for _, kind, _, _ in actions:
        if kind is ir.FORWARD:
            held += 1
            most = max(most, held)
        elif kind is ir.BACKWARD_WEIGHT:
            held -= 1
    return most
