"""Sends after what makes their tensors, receives before what needs them.

    compute only        0F0 0F1 0B0 0B1
    with communication  0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1

An action names a stage and a microbatch; it stands for the messages on all of the stage's edges to other ranks. A send
is started at its place and nobody waits for it there, and a receive stands right before its consumer. On each channel
receives come in the order of the sends: where two stages take their microbatches in different orders, a receive stands
earlier, before the consumer of a later message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, Edge, Neighbours, Order, Placement, ir, neighbours

_Flow = tuple[Sequence[bool], ActionType, Sequence[bool], ActionType]
"""Whether each stage receives, as which action, and whether it sends, as which action."""

_Turns = dict[tuple[int, ActionType], list[int]]
"""The microbatches in the order of their sends, for receives whose consumers run in another order."""


def insert_communication(
    order: Order, placement: Placement, edges: Iterable[Edge] | None = None, backward: bool = True
) -> Order:
    """The order with SEND_F, RECV_F and, with ``backward``, SEND_B and RECV_B; stages on one rank need none.

    Raises InvalidOrderError where two stages send to one stage in orders that no receiver can follow.
    """
    remote = neighbours(len(placement), edges).on_other_ranks(placement)
    before, after = [bool(stages) for stages in remote.before], [bool(stages) for stages in remote.after]
    flows: dict[ActionType, _Flow] = {ir.FORWARD: (before, ir.RECV_F, after, ir.SEND_F)}
    if backward:
        flows[ir.FULL_BACKWARD] = flows[ir.BACKWARD_INPUT] = (after, ir.RECV_B, before, ir.SEND_B)
    turns = _turns_of_senders(order, remote, backward)
    return {rank: _insert_on_rank(actions, flows, turns) for rank, actions in order.items()}


def _insert_on_rank(actions: Sequence[Action], flows: dict[ActionType, _Flow], turns: _Turns) -> list[Action]:
    result: list[Action] = []
    append, flow_of = result.append, flows.get
    to_come = {key: iter(turn) for key, turn in turns.items()}
    come: set[Action] = set()
    for action in actions:
        sends: list[Action] = []
        for stage, kind, microbatch, _ in action[3] or (action,):
            flow = flow_of(kind)
            if flow is None:
                continue
            receives, receive_kind, sending, send_kind = flow
            if receives[stage]:
                receive = Action(stage, receive_kind, microbatch)
                if (stage, receive_kind) not in to_come:
                    append(receive)
                elif receive not in come:
                    for sent in to_come[stage, receive_kind]:
                        append(Action(stage, receive_kind, sent))
                        come.add(result[-1])
                        if sent == microbatch:
                            break
            if sending[stage]:
                sends.append(Action(stage, send_kind, microbatch))
        append(action)
        result += sends
    return result


def _turns_of_senders(order: Order, remote: Neighbours, backward: bool) -> _Turns:
    forwards, backwards = _microbatches_in_order(order, len(remote.before))
    turns: _Turns = {}
    for sequences, senders_of, kind in (
        (forwards, remote.before, ir.RECV_F),
        (backwards, remote.after if backward else (), ir.RECV_B),
    ):
        for stage, senders in enumerate(senders_of):
            if any(sequences[sender] != sequences[stage] for sender in senders):
                _check_one_turn(stage, senders, sequences, kind)
                turns[stage, kind] = sequences[senders[0]]
    return turns


def _check_one_turn(stage: int, senders: Sequence[int], sequences: list[list[int]], kind: ActionType) -> None:
    """One receive action takes from all senders at once, so they have to send in one order."""
    first = senders[0]
    for other in senders[1:]:
        for mine, theirs in zip(sequences[first], sequences[other], strict=False):
            if mine != theirs:
                raise InvalidOrderError(
                    f"Stages {first} and {other} both send to stage {stage}, but stage {first} sends microbatch {mine} "
                    f"where stage {other} sends microbatch {theirs}, so {Action(stage, kind, mine)} has no place. Let "
                    f"both run their microbatches in one order."
                )


def _microbatches_in_order(order: Order, num_stages: int) -> tuple[list[list[int]], list[list[int]]]:
    """For each stage, its microbatches in the order of its forwards and of its input gradients."""
    forwards: list[list[int]] = [[] for _ in range(num_stages)]
    backwards: list[list[int]] = [[] for _ in range(num_stages)]
    for actions in order.values():
        for action in actions:
            for stage, kind, microbatch, _ in action.sub_actions or (action,):
                if kind is ir.FORWARD:
                    forwards[stage].append(microbatch or 0)
                elif kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_INPUT:
                    backwards[stage].append(microbatch or 0)
    return forwards, backwards
