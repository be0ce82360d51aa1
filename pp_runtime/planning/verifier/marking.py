"""The place of an error in the text of an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, Order

_AROUND = 4


def marked(rank: int, actions: Sequence[Action], position: int) -> str:
    """The rank's actions around a position, with a line of carets under the one at it.

    A position past the last action is the end of the rank's list.
    """
    start, stop = max(position - _AROUND, 0), position + _AROUND + 1
    texts = [str(action) for action in actions[start:stop]]
    if position >= len(actions):
        texts.append("(end)")
    before = f"rank {rank}: " + ("... " if start else "")
    lead = len(before) + sum(len(text) + 1 for text in texts[: position - start])
    line = before + " ".join(texts) + (" ..." if stop < len(actions) else "")
    return f"{line}\n{' ' * lead}{'^' * len(texts[position - start])}"


def refuse(order: Order, rank: int, position: int, reason: str) -> NoReturn:
    """Raise InvalidOrderError for an action of the order."""
    raise InvalidOrderError(refusal(order, rank, position, reason))


def refusal(order: Order, rank: int, position: int, reason: str) -> str:
    """The message for an action of the order."""
    actions = order[rank]
    what = f"action {position}, {actions[position]}" if position < len(actions) else "end of its actions"
    return f"Rank {rank}, {what}: {reason}\n{marked(rank, actions, position)}"
