"""Whether an order with its communication moves every message, in one sequence at both ends, and comes to its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, Edge, Neighbours, Order, Placement, ir, neighbours
from pp_runtime.planning.verifier.completeness import check_completeness
from pp_runtime.planning.verifier.deadlock import check_progress_with_sends
from pp_runtime.planning.verifier.marking import refusal, refuse

# What an action receives before it and sends after it.
_MESSAGES: dict[ActionType, tuple[ActionType, ActionType]] = {
    ir.FORWARD: (ir.RECV_F, ir.SEND_F),
    ir.FULL_BACKWARD: (ir.RECV_B, ir.SEND_B),
    ir.BACKWARD_INPUT: (ir.RECV_B, ir.SEND_B),
}
_MAKER = {ir.SEND_F: "F", ir.SEND_B: "B or I"}


def verify_communication(
    order_with_comms: Order,
    placement: Placement,
    num_microbatches: int,
    edges: Iterable[Edge] | None = None,
    *,
    forward_only: bool = False,
) -> None:
    """Raise InvalidOrderError unless the order is complete, messages included, and does not deadlock under rendezvous.

    Beyond what :func:`verify` asks of the compute actions: every output and gradient that another rank needs is sent
    once, after it is made, and received once, before it is used; each channel's sends and receives stand in one
    sequence; and no circle of waits exists though nothing is buffered, a receive being posted at its place and waited
    for by its consumer. Linear in the number of actions.
    """
    check_completeness(order_with_comms, placement, num_microbatches, forward_only=forward_only)
    around = neighbours(len(placement), edges)
    remote = around.on_other_ranks(placement)
    sequences = _Sequences(order_with_comms, placement, num_microbatches, remote, forward_only)
    _check_channels(order_with_comms, placement, remote, sequences)
    check_progress_with_sends(order_with_comms, placement, num_microbatches, around)


class _Sequences:
    """For each stage and type of communication, its microbatches in sequence; each stands once, where it may."""

    def __init__(
        self, order: Order, placement: Placement, num_microbatches: int, remote: Neighbours, forward_only: bool
    ) -> None:
        self.num_microbatches = num_microbatches
        nobody = ((),) * len(placement)
        gradients_to, gradients_from = (nobody, nobody) if forward_only else (remote.before, remote.after)
        self.partners: dict[ActionType, Sequence[tuple[int, ...]]] = {
            ir.SEND_F: remote.after,
            ir.RECV_F: remote.before,
            ir.SEND_B: gradients_to,
            ir.RECV_B: gradients_from,
        }
        self.of: dict[ActionType, list[list[int]]] = {kind: [[] for _ in placement] for kind in self.partners}
        size = len(placement) * num_microbatches
        self._seen = {kind: bytearray(size) for kind in self.partners}
        self._made = {kind: bytearray(size) for kind in _MAKER}
        for rank in order:
            self._read(order, rank)
        for kind, by_stage in self.of.items():
            for stage, sequence in enumerate(by_stage):
                if self.partners[kind][stage] and len(sequence) < num_microbatches:
                    missing = Action(stage, kind, min(set(range(num_microbatches)) - set(sequence)))
                    refuse(order, placement[stage], len(order[placement[stage]]), f"the order has no {missing}.")

    def _read(self, order: Order, rank: int) -> None:
        partners, seen, made = self.partners, self._seen, self._made
        for position, action in enumerate(order[rank]):
            for stage, kind, microbatch, _ in action[3] or (action,):
                if kind in _MESSAGES:
                    receive, send = _MESSAGES[kind]
                    place = stage * self.num_microbatches + microbatch  # type: ignore[operator]
                    made[send][place] = 1
                    if partners[receive][stage] and not seen[receive][place]:
                        refuse(order, rank, position, f"{Action(stage, receive, microbatch)} does not stand before it.")
                elif kind in seen:
                    reason = self._objection(stage, kind, microbatch)
                    if reason is not None:
                        refuse(order, rank, position, reason)
                    seen[kind][stage * self.num_microbatches + microbatch] = 1  # type: ignore[operator]
                    self.of[kind][stage].append(microbatch)  # type: ignore[arg-type]

    def _objection(self, stage: int, kind: ActionType, microbatch: int | None) -> str | None:
        """Why a send or receive may not stand here."""
        if microbatch is None or not 0 <= microbatch < self.num_microbatches:
            return f"microbatch {microbatch} is not one of 0 to {self.num_microbatches - 1}."
        place = stage * self.num_microbatches + microbatch
        if self._seen[kind][place]:
            return "it has stood before."
        if not self.partners[kind][stage]:
            return f"stage {stage} has no such message to or from another rank."
        if kind in _MAKER and not self._made[kind][place]:
            return f"what it sends is not made before it, by an {_MAKER[kind]} of stage {stage}."
        return None


def _check_channels(order: Order, placement: Placement, remote: Neighbours, sequences: _Sequences) -> None:
    """Both ends of each channel have one sequence of microbatches."""
    for send, receive, senders_of in ((ir.SEND_F, ir.RECV_F, remote.before), (ir.SEND_B, ir.RECV_B, remote.after)):
        for stage, senders in enumerate(senders_of):
            for sender in senders:
                sent, received = sequences.of[send][sender], sequences.of[receive][stage]
                if sent != received:
                    turn = next(
                        turn for turn, pair in enumerate(zip(sent, received, strict=True)) if pair[0] != pair[1]
                    )
                    _refuse_channel(
                        order, placement, Action(sender, send, sent[turn]), Action(stage, receive, received[turn])
                    )


def _refuse_channel(order: Order, placement: Placement, send: Action, receive: Action) -> None:
    sender, receiver = placement[send.stage_index], placement[receive.stage_index]
    reason = f"rank {sender} sends {send} at this turn of the channel; both ends need one sequence."
    other = f"rank {receiver} receives {receive} at this turn of the channel."
    raise InvalidOrderError(
        refusal(order, receiver, order[receiver].index(receive), reason)
        + "\n"
        + refusal(order, sender, order[sender].index(send), other)
    )
