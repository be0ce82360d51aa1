"""Actions, and the orders that are made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from pp_runtime.errors import ActionTextError


class ActionType(str, Enum):
    """What an action does. The value is the text that stands in an order file."""

    FORWARD = "F"  # output[s][m] = stage[s](received[s][m])
    BACKWARD_INPUT = "I"  # gradients for the stage's inputs; saves what BACKWARD_WEIGHT needs
    BACKWARD_WEIGHT = "W"  # gradients for the stage's weights, after BACKWARD_INPUT
    UNSHARD = "UNSHARD"  # gather a stage's sharded weights
    RESHARD = "RESHARD"  # free the gathered weights
    SEND_F = "SEND_F"  # start sending output[s][m] to every other rank that needs it
    RECV_F = "RECV_F"  # receive what stage s gets for microbatch m from other ranks
    SEND_B = "SEND_B"  # start sending the gradients of stage s's inputs to other ranks
    RECV_B = "RECV_B"  # receive the gradients of stage s's outputs from other ranks
    FULL_BACKWARD = "B"  # BACKWARD_INPUT and BACKWARD_WEIGHT at once
    OVERLAP_F_B = "OVERLAP_F_B"  # a forward and a backward that a custom function may interleave
    REDUCE_GRAD = "REDUCE_GRAD"  # reduce a stage's gradients over its data-parallel ranks

    @staticmethod
    def from_str(text: str) -> ActionType:
        """The type whose text this is; ActionTextError for any other text."""
        kind = _TYPE_OF_TEXT.get(text)
        if kind is None:
            raise ActionTextError(f"'{text}' is not an action type; the types are {', '.join(_TYPE_OF_TEXT)}.")
        return kind


_TYPE_OF_TEXT: dict[str, ActionType] = {kind.value: kind for kind in ActionType}

FORWARD = ActionType.FORWARD
BACKWARD_INPUT = ActionType.BACKWARD_INPUT
BACKWARD_WEIGHT = ActionType.BACKWARD_WEIGHT
UNSHARD = ActionType.UNSHARD
RESHARD = ActionType.RESHARD
SEND_F = ActionType.SEND_F
RECV_F = ActionType.RECV_F
SEND_B = ActionType.SEND_B
RECV_B = ActionType.RECV_B
FULL_BACKWARD = ActionType.FULL_BACKWARD
OVERLAP_F_B = ActionType.OVERLAP_F_B
REDUCE_GRAD = ActionType.REDUCE_GRAD

COMPUTE_TYPES = frozenset({FORWARD, FULL_BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, OVERLAP_F_B})
COMMUNICATION_TYPES = frozenset({SEND_F, RECV_F, SEND_B, RECV_B})
STAGE_TYPES = frozenset({UNSHARD, RESHARD, REDUCE_GRAD})  # name a stage, and no microbatch

# Longest first, so that "B" cannot take the start of a longer name.
_ACTION_TEXT = re.compile(
    r"(\d+)(" + "|".join(sorted((kind.value for kind in ActionType if kind is not OVERLAP_F_B), key=len, reverse=True))
    + r")(\d*)",
    re.ASCII,
)  # fmt: skip
_PAIR_TEXT = re.compile(r"\(([^()]*)\)([A-Z_]+)", re.ASCII)


class Action(NamedTuple):
    """One thing a rank does: ``2F3`` is the forward of microbatch 3 on stage 2.

    An action with sub-actions, ``(0F5;7B2)OVERLAP_F_B``, has stage index -1 and no microbatch of its own.
    A named tuple, because orders have millions of actions.
    """

    stage_index: int
    computation_type: ActionType
    microbatch_index: int | None = None
    sub_actions: tuple[Action, ...] | None = None

    def __repr__(self) -> str:
        stage, kind, microbatch, parts = self
        if parts is not None:
            return f"({';'.join(map(repr, parts))}){kind._value_}"
        if microbatch is None:
            return f"{stage}{kind._value_}"
        return f"{stage}{kind._value_}{microbatch}"

    @property
    def is_compute_op(self) -> bool:
        """Whether it runs part of the model, alone or with others."""
        return self.computation_type in COMPUTE_TYPES

    @staticmethod
    def from_str(action_string: str) -> Action | None:
        """The action with this text; None for blank text. ActionTextError names text that is no action."""
        text = action_string.strip()
        if not text:
            return None
        if text.startswith("("):
            return _pair_from_text(text)
        match = _ACTION_TEXT.fullmatch(text)
        if match is None:
            raise ActionTextError(
                f"'{action_string}' is not an action; an action is [stage][type][microbatch], such as 2F0, 1UNSHARD or "
                "3SEND_F1, or (action;action)OVERLAP_F_B."
            )
        stage, kind, microbatch = match.groups()
        action_type = _TYPE_OF_TEXT[kind]
        if microbatch and action_type in STAGE_TYPES:
            raise ActionTextError(
                f"'{action_string}' is not an action: {kind} is about a whole stage, without a microbatch."
            )
        if not microbatch and action_type not in STAGE_TYPES:
            raise ActionTextError(f"'{action_string}' is not an action: {kind} needs a microbatch, such as {text}0.")
        return Action(int(stage), action_type, int(microbatch) if microbatch else None)


def _pair_from_text(text: str) -> Action:
    match = _PAIR_TEXT.fullmatch(text)
    if match is None:
        raise ActionTextError(f"'{text}' is not an action; sub-actions are written as (0F5;7B2)OVERLAP_F_B.")
    inside, kind = match.groups()
    if kind != OVERLAP_F_B.value:
        raise ActionTextError(f"'{text}' is not an action: only OVERLAP_F_B has sub-actions, not '{kind}'.")
    parts = []
    for part in inside.split(";"):
        action = Action.from_str(part)
        if action is None or not action.is_compute_op:
            raise ActionTextError(f"'{text}' is not an action: its part '{part}' is not an F, I, W or B.")
        parts.append(action)
    return Action(-1, OVERLAP_F_B, None, tuple(parts))


Order = dict[int, list[Action]]
"""What each rank does, first to last."""

Placement = tuple[int, ...]
"""``placement[stage]`` is the rank that holds the stage."""

_ComputationType = ActionType
_Action = Action


def leaves(actions: Iterable[Action]) -> Iterator[Action]:
    """The actions with every OVERLAP_F_B replaced by its parts."""
    for action in actions:
        if action.sub_actions is None:
            yield action
        else:
            yield from action.sub_actions


def placement_of(order: Mapping[int, Iterable[Action]]) -> Placement:
    """Where an order has its stages: the rank whose list names the stage.

    ValueError if two ranks name one stage, or if a stage below the highest named one is named nowhere.
    """
    rank_of: dict[int, int] = {}
    for rank, actions in order.items():
        for stage in {action[0] for action in leaves(actions)}:
            other = rank_of.setdefault(stage, rank)
            if other != rank:
                first = next(action for action in leaves(actions) if action[0] == stage)
                raise ValueError(
                    f"Stage {stage} stands on rank {other} and on rank {rank}, which begins it with {first}; "
                    f"a stage has one rank."
                )
    missing = sorted(set(range(max(rank_of, default=-1) + 1)) - rank_of.keys())
    if missing:
        raise ValueError(f"The order names stage {max(rank_of)}, but no action of stage {missing[0]}.")
    return tuple(rank_of[stage] for stage in range(len(rank_of)))


def microbatch_count(order: Mapping[int, Iterable[Action]]) -> int:
    """One more than the highest microbatch that the order names."""
    highest = -1
    for actions in order.values():
        for _, _, microbatch, _ in leaves(actions):
            if microbatch is not None and microbatch > highest:
                highest = microbatch
    return highest + 1


def from_torch_form(order: Mapping[int, Sequence[Action | None]]) -> Order:
    """An order without the Nones that mark idle steps in torch's form."""
    return {rank: [action for action in actions if action is not None] for rank, actions in order.items()}


def to_torch_form(order: Mapping[int, Sequence[Action]]) -> dict[int, list[Action | None]]:
    """An order as rows of equal steps, None where a rank waits for another: the form of torch's ``pipeline_order``.

    Every action takes one step, on a chain of stages. An order that never comes to its end has no such form; what is
    left of it then follows without a gap, so that it can be shown.
    """
    last_stage = max((a[0] for actions in order.values() for a in leaves(actions)), default=-1)
    done: dict[tuple[int, bool, int | None], int] = {}  # (stage, is backward, microbatch) -> step
    rows: dict[int, list[Action | None]] = {rank: [] for rank in order}
    place = dict.fromkeys(order, 0)
    moving = True
    while moving:
        moving = False
        for rank, actions in order.items():
            row = rows[rank]
            while place[rank] < len(actions):
                action = actions[place[rank]]
                ready = _ready_step(action, done, last_stage)
                if ready is None:
                    break
                row.extend([None] * (ready - len(row)))
                row.append(action)
                for stage, kind, microbatch, _ in action.sub_actions or (action,):
                    if kind is not BACKWARD_WEIGHT:
                        done[stage, kind is not FORWARD, microbatch] = len(row)
                place[rank] += 1
                moving = True
    for rank, actions in order.items():
        rows[rank].extend(actions[place[rank] :])
    return rows


def _ready_step(action: Action, done: Mapping[tuple[int, bool, int | None], int], last_stage: int) -> int | None:
    """The first step in which what the action needs from other stages is there; None if that is not known yet."""
    ready = 0
    for stage, kind, microbatch, _ in action.sub_actions or (action,):
        if kind is FORWARD and stage > 0:
            step = done.get((stage - 1, False, microbatch))
        elif kind in (FULL_BACKWARD, BACKWARD_INPUT) and stage < last_stage:
            step = done.get((stage + 1, True, microbatch))
        else:
            continue
        if step is None:
            return None
        ready = max(ready, step)
    return ready
