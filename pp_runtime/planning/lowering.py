"""From a rank's actions to the flat program that the C++ executor reads.

    1RECV_F0 1F0 1SEND_F0     ->  receive on the channel of edge 0>1 | forward | send on the channel of edge 1>2
    1F0 (2 is on this rank)   ->  forward | hand the outputs over to stage 2

An action names a stage; its messages, one an edge, are worked out here. Nothing is left to decide at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pp_runtime.orders import Action, ActionType, Placement, ir

# Operation numbers of csrc/oversight/operation.h
_COMPUTE = {ir.FORWARD: 0, ir.FULL_BACKWARD: 1, ir.BACKWARD_INPUT: 2, ir.BACKWARD_WEIGHT: 3}
_SEND_F, _RECV_F, _SEND_B, _RECV_B, _HAND_F, _HAND_B, _CALL = 4, 5, 6, 7, 8, 9, 10
_LAST, _RELEASES, _ONLY_DATA_PARALLEL, _COMPUTES = 1, 2, 4, 8
_WITHOUT_OBJECT = (ir.UNSHARD, ir.RESHARD, ir.REDUCE_GRAD)

Handler = Callable[[Action], None]
MethodHandler = Callable[[Action, bool], None]
"""Is also told whether the action is its stage's last one that makes weight gradients."""


@dataclass(frozen=True, slots=True)
class Handlers:
    """What is called in place of the runtime, by type; those of a type before those of a stage.

    ``data_parallel`` are for stages that are data-parallel in the step at hand.
    """

    by_type: Mapping[ActionType, Handler] = field(default_factory=dict)
    of_stage: Mapping[tuple[int, ActionType], MethodHandler] = field(default_factory=dict)
    data_parallel: Mapping[ActionType, Handler] = field(default_factory=dict)

    def of(self, action: Action, *, last: bool) -> Handler | None:
        """What is called for an action, whether its stage is data-parallel or not."""
        if (handler := self.by_type.get(action.computation_type)) is not None:
            return handler
        method = self.of_stage.get((action.stage_index, action.computation_type))
        return None if method is None else lambda action: method(action, last)


@dataclass(frozen=True, slots=True)
class Channel:
    """One direction of one edge, between the two ranks that hold its stages."""

    source: int
    destination: int
    backward: bool
    sender: int
    receiver: int

    @property
    def name(self) -> str:
        arrow = "<-" if self.backward else "->"
        return f"stage {self.source} {arrow} stage {self.destination}"


@dataclass(slots=True)
class Lowered:
    """A rank's program and the tables that its numbers point into."""

    numbers: list[int] = field(default_factory=list)
    send_channels: list[Channel] = field(default_factory=list)
    receive_channels: list[Channel] = field(default_factory=list)
    callbacks: list[Callable[[], None]] = field(default_factory=list)
    callback_names: list[str] = field(default_factory=list)


class Lowering:
    """Lowers the actions of one rank.

    ``edges`` are (source stage, destination stage) pairs; their places in it are the program's edge numbers. ``slots``
    gives each stage of this rank its place in the executor's table.
    """

    def __init__(
        self,
        rank: int,
        placement: Placement,
        edges: Sequence[tuple[int, int]],
        slots: Mapping[int, int],
        handlers: Handlers,
    ) -> None:
        self._rank = rank
        self._placement = placement
        self._edges = edges
        self._slots = slots
        self._handlers = handlers
        self._after: dict[int, list[tuple[int, int]]] = {stage: [] for stage in slots}
        self._before: dict[int, list[tuple[int, int]]] = {stage: [] for stage in slots}
        for number, (source, destination) in enumerate(edges):
            if source in slots:
                self._after[source].append((number, destination))
            if destination in slots:
                self._before[destination].append((number, source))
        self._lowered = Lowered()
        self._sends: dict[tuple[int, bool], int] = {}
        self._receives: dict[tuple[int, bool], int] = {}

    def lower(self, actions: Sequence[Action]) -> Lowered:
        """The program of these actions."""
        last = _last_backwards(actions)
        for action in actions:
            self._lower(action, last)
        return self._lowered

    def _lower(self, action: Action, last: Mapping[int, Action]) -> None:
        stage, kind, microbatch, parts = action
        handler = self._handlers.of(action, last=last.get(stage) is action)
        if kind in _COMPUTE:
            if handler is not None:
                self._call(handler, action)
            else:
                self._emit(_COMPUTE[kind], stage, microbatch, flags=_LAST if last.get(stage) is action else 0)
            self._hand_over(stage, kind, microbatch)
        elif kind is ir.OVERLAP_F_B:
            if handler is not None:
                self._call(handler, action)
                for part in parts or ():
                    self._hand_over(part.stage_index, part.computation_type, part.microbatch_index)
            else:
                for part in parts or ():
                    self._lower(part, last)
        elif kind in _WITHOUT_OBJECT:
            if handler is not None:
                self._call(handler, action)
            elif kind in self._handlers.data_parallel:
                self._call(self._handlers.data_parallel[kind], action, flags=_ONLY_DATA_PARALLEL)
        else:
            self._message(stage, kind, microbatch)

    def _call(self, handler: Handler, action: Action, flags: int = 0) -> None:
        stage = action.stage_index if action.stage_index in self._slots else -1
        flags |= _COMPUTES if action.is_compute_op else 0
        self._emit(_CALL, stage, action.microbatch_index, flags=flags, callback=len(self._lowered.callbacks))
        self._lowered.callbacks.append(partial(handler, action))
        self._lowered.callback_names.append(str(action))

    def _hand_over(self, stage: int, kind: ActionType, microbatch: int | None) -> None:
        """Between stages of this rank nothing is sent: outputs and gradients change hands right after they are made."""
        if kind is ir.FORWARD:
            local = [(n, other) for n, other in self._after[stage] if self._placement[other] == self._rank]
            nothing_is_sent = len(local) == len(self._after[stage])
            for place, (number, other) in enumerate(local):
                releases = nothing_is_sent and place == len(local) - 1
                self._emit(_HAND_F, stage, microbatch, number, self._slots[other], flags=_RELEASES if releases else 0)
        elif kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_INPUT:
            for number, other in self._before[stage]:
                if self._placement[other] == self._rank:
                    self._emit(_HAND_B, stage, microbatch, number, self._slots[other])

    def _message(self, stage: int, kind: ActionType, microbatch: int | None) -> None:
        backward = kind is ir.SEND_B or kind is ir.RECV_B
        neighbours = self._after[stage] if kind is ir.SEND_F or kind is ir.RECV_B else self._before[stage]
        remote = [number for number, other in neighbours if self._placement[other] != self._rank]
        for place, number in enumerate(remote):
            if kind is ir.SEND_F:
                flags = _RELEASES if place == len(remote) - 1 else 0
                self._emit(_SEND_F, stage, microbatch, number, self._send_channel(number, backward), flags=flags)
            elif kind is ir.SEND_B:
                self._emit(_SEND_B, stage, microbatch, number, self._send_channel(number, backward))
            elif kind is ir.RECV_F:
                self._emit(_RECV_F, stage, microbatch, number, self._receive_channel(number, backward))
            else:
                self._emit(_RECV_B, stage, microbatch, number, self._receive_channel(number, backward))

    def _send_channel(self, number: int, backward: bool) -> int:
        return self._channel(number, backward, self._sends, self._lowered.send_channels)

    def _receive_channel(self, number: int, backward: bool) -> int:
        return self._channel(number, backward, self._receives, self._lowered.receive_channels)

    def _channel(self, number: int, backward: bool, known: dict[tuple[int, bool], int], table: list[Channel]) -> int:
        key = (number, backward)
        if key not in known:
            known[key] = len(table)
            source, destination = self._edges[number]
            ends = (self._placement[source], self._placement[destination])
            sender, receiver = reversed(ends) if backward else ends
            table.append(Channel(source, destination, backward, sender, receiver))
        return known[key]

    def _emit(
        self,
        operation: int,
        stage: int,
        microbatch: int | None,
        edge: int = -1,
        channel: int = -1,
        *,
        flags: int = 0,
        callback: int = -1,
    ) -> None:
        slot = self._slots[stage] if stage >= 0 else -1
        self._lowered.numbers += (
            operation,
            flags,
            slot,
            -1 if microbatch is None else microbatch,
            edge,
            channel,
            callback,
        )


def _last_backwards(actions: Sequence[Action]) -> dict[int, Action]:
    """For each stage, its last action that makes weight gradients."""
    last: dict[int, Action] = {}
    for action in actions:
        for part in action.sub_actions or (action,):
            if part.computation_type is ir.FULL_BACKWARD or part.computation_type is ir.BACKWARD_WEIGHT:
                last[part.stage_index] = part
    return last
