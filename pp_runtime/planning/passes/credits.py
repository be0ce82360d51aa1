"""How many messages each channel's receiver needs room for, and how far ahead its sender must be able to be.

A message takes room when its sender begins to write it and gives it back when its tensors die at the receiver: an
activation with the consumer's B or W (with its F, where the stage runs no backward), a gradient with the consumer's B
or I. A sender without room waits. The least room is what is alive at once at the receiver; where ranks that wait for
room would wait for each other, there is more, until none do.

A sender also waits while it is as far ahead of what the receiver has taken as it may be. Mostly one message will do, so
that a channel fills no more room than its receiver really holds; it is more where ranks would wait for each other, and
where messages pile up even in a step in which nobody waits for room, by more than the next one: in looped orders, where
a rank gets gradients for one stage while it still works on a later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, Edge, Order, Placement, ir, neighbours

ChannelKey = tuple[Edge, bool]
"""An edge, and whether it is its way back: gradients."""


def peak_messages(
    order_with_comms: Order, placement: Placement, edges: Iterable[Edge] | None = None
) -> dict[ChannelKey, int]:
    """For each channel between two ranks, how many messages its receiver needs room for.

    With this much room, or more, no rank waits for ever for a send that has no room, whatever the actions' times: an
    order that ends with endless room ends with this. Linear in the number of actions. Raises InvalidOrderError for an
    order that does not end even with endless room.
    """
    return {key: limit.room for key, limit in channel_limits(order_with_comms, placement, edges).items()}


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a channel: messages sent and not yet freed, and messages sent and not yet taken."""

    room: int
    ahead: int


def channel_limits(
    order_with_comms: Order, placement: Placement, edges: Iterable[Edge] | None = None
) -> dict[ChannelKey, Limits]:
    """For each channel between two ranks, limits with which no rank waits for ever, nor long for a pile to be taken.

    What `peak_messages` says of the room holds for both limits together.
    """
    run = _Run(order_with_comms, placement, edges)
    run.to_the_end()
    run.give_room_for_piles()
    return {key: Limits(run.room[number], run.ahead[number]) for number, key in enumerate(run.keys)}


class _Run:
    """A run of all ranks that counts messages only.

    A row is a stage and a direction, since all messages that a stage receives in one direction live equally long. What
    a rank does is a list of small numbers: three times the row, and what happens to it.
    """

    _SEND, _RECEIVE, _FREE = range(3)

    def __init__(self, order: Order, placement: Placement, edges: Iterable[Edge] | None) -> None:
        stages = len(placement)
        remote = neighbours(stages, edges).on_other_ranks(placement)
        self.order = order
        self.placement = placement
        self.keys: list[ChannelKey] = []
        self.row_of: list[int] = []  # channel -> row of its receiver
        self.out_of: list[list[int]] = [[] for _ in range(2 * stages)]  # row of the sender -> channels
        self.into: list[list[int]] = [[] for _ in range(2 * stages)]  # row of the receiver -> channels
        for backward, senders_of in ((False, remote.before), (True, remote.after)):
            for receiver, senders in enumerate(senders_of):
                for sender in senders:
                    number = len(self.keys)
                    self.keys.append((Edge(receiver, sender) if backward else Edge(sender, receiver), backward))
                    self.row_of.append(stages * backward + receiver)
                    self.out_of[stages * backward + sender].append(number)
                    self.into[stages * backward + receiver].append(number)
        self.sent, self.received, self.freed = [0] * len(self.keys), [0] * len(self.into), [0] * len(self.into)
        peaks = [1] * (2 * stages)
        happens = self._what_happens(stages)
        found = {rank: _steps(actions, happens, peaks) for rank, actions in order.items()}
        self.steps = {rank: steps for rank, (steps, _) in found.items()}
        self.work = {rank: work for rank, (_, work) in found.items()}
        self.room = [peaks[row] for row in self.row_of]
        self.ahead = [1] * len(self.keys)

    def _what_happens(self, stages: int) -> dict[ActionType, list[tuple[int, ...]]]:
        """For each type of action and stage, the steps that it is."""
        trained = [False] * stages
        for actions in self.order.values():
            for action in actions:
                if action[1] is ir.FULL_BACKWARD or action[1] is ir.BACKWARD_WEIGHT:
                    trained[action[0]] = True
                elif action[3]:
                    for stage, kind, _, _ in action[3]:
                        trained[stage] |= kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_WEIGHT

        def step(row: int, what: int) -> tuple[int, ...]:
            return (3 * row + what,) if (self.out_of if what == self._SEND else self.into)[row] else ()

        rows = range(stages)
        return {
            ir.SEND_F: [step(row, self._SEND) for row in rows],
            ir.SEND_B: [step(stages + row, self._SEND) for row in rows],
            ir.RECV_F: [step(row, self._RECEIVE) for row in rows],
            ir.RECV_B: [step(stages + row, self._RECEIVE) for row in rows],
            ir.FORWARD: [() if trained[row] else step(row, self._FREE) for row in rows],
            ir.FULL_BACKWARD: [step(row, self._FREE) + step(stages + row, self._FREE) for row in rows],
            ir.BACKWARD_INPUT: [step(stages + row, self._FREE) for row in rows],
            ir.BACKWARD_WEIGHT: [step(row, self._FREE) for row in rows],
        }

    def to_the_end(self) -> None:
        """Run every rank; when all wait and some for room, give one of them room."""
        sent, received, freed = self.sent, self.received, self.freed
        row_of, room, ahead = self.row_of, self.room, self.ahead
        place = dict.fromkeys(self.steps, 0)
        waiting: dict[int, int] = {}  # channel -> the rank that waits for a message in it, or for room
        ready = list(self.steps)
        while ready or waiting:
            rank = ready.pop() if ready else self._give_room(place, waiting)
            steps = self.steps[rank]
            for position in range(place[rank], len(steps)):
                row, what = divmod(steps[position], 3)
                if what == _Run._FREE:
                    freed[row] += 1
                    changed = self.into[row]
                elif what == _Run._RECEIVE:
                    blocked = [channel for channel in self.into[row] if sent[channel] <= received[row]]
                    if blocked:
                        break
                    received[row] += 1
                    changed = self.into[row]
                else:
                    changed = self.out_of[row]
                    blocked = [
                        c
                        for c in changed
                        if sent[c] - freed[row_of[c]] >= room[c] or sent[c] - received[row_of[c]] >= ahead[c]
                    ]
                    if blocked:
                        break
                    for channel in changed:
                        sent[channel] += 1
                if waiting:
                    for channel in changed:
                        if channel in waiting:
                            ready.append(waiting.pop(channel))
            else:
                place[rank] = len(steps)
                continue
            place[rank] = position
            waiting[blocked[0]] = rank

    def give_room_for_piles(self) -> None:
        """Raise the limits of channels in which more messages lie untaken, were there room, than may, and one."""
        sent_at, received_at, freed_at = self._moments()
        for channel, row in enumerate(self.row_of):
            pile = _most_between(sent_at[channel], received_at[row])
            if pile > self.ahead[channel] + 1:
                self.ahead[channel] = pile
                self.room[channel] = max(self.room[channel], _most_between(sent_at[channel], freed_at[row]))

    def _moments(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """When each message is sent (by channel), received and freed (by row) in a step with endless room.

        F, I and W take one unit of time, B two, messages none.
        """
        sent_at: list[list[int]] = [[] for _ in self.keys]
        received_at: list[list[int]] = [[] for _ in self.into]
        freed_at: list[list[int]] = [[] for _ in self.into]
        place, clock = dict.fromkeys(self.steps, 0), dict.fromkeys(self.steps, 0)
        waiting: dict[int, int] = {}  # channel -> the rank that waits for a message in it
        ready = list(self.steps)
        while ready:
            rank = ready.pop()
            steps, work, now = self.steps[rank], self.work[rank], clock[rank]
            for position in range(place[rank], len(steps)):
                row, what = divmod(steps[position], 3)
                if what == _Run._RECEIVE:
                    number = len(received_at[row])
                    missing = [channel for channel in self.into[row] if len(sent_at[channel]) <= number]
                    if missing:
                        place[rank], clock[rank] = position, now
                        waiting[missing[0]] = rank
                        break
                    now = max(now + work[position], *(sent_at[channel][number] for channel in self.into[row]))
                    received_at[row].append(now)
                    continue
                now += work[position]
                if what == _Run._FREE:
                    freed_at[row].append(now)
                    continue
                for channel in self.out_of[row]:
                    sent_at[channel].append(now)
                    if channel in waiting:
                        ready.append(waiting.pop(channel))
        return sent_at, received_at, freed_at

    def _give_room(self, place: dict[int, int], waiting: dict[int, int]) -> int:
        senders = [c for c, rank in waiting.items() if self.steps[rank][place[rank]] % 3 == _Run._SEND]
        # Whose receiver has most to do before it takes the message would wait longest.
        senders.sort(key=lambda channel: self._steps_before_take(place, channel), reverse=True)
        # Being further ahead costs nothing where there is room.
        for limit, used in ((self.ahead, self.received), (self.room, self.freed)):
            for channel in senders:
                if self.sent[channel] - used[self.row_of[channel]] >= limit[channel]:
                    limit[channel] += 1
                    return waiting.pop(channel)
        rank = min(waiting.values())
        row = self.steps[rank][place[rank]] // 3
        backward, stage = divmod(row, len(self.into) // 2)
        raise InvalidOrderError(
            f"Rank {rank} waits for ever for {'a gradient' if backward else 'an activation'} of stage {stage}."
        )

    def _steps_before_take(self, place: dict[int, int], channel: int) -> int:
        row = self.row_of[channel]
        receiver = self.placement[row % len(self.placement)]
        takes, taken = self._takes[row], self.received[row]
        return (takes[taken] if taken < len(takes) else len(self.steps[receiver])) - place[receiver]

    @cached_property
    def _takes(self) -> list[list[int]]:
        """For each row, where its receives stand among its rank's steps."""
        takes: list[list[int]] = [[] for _ in self.into]
        for steps in self.steps.values():
            for position, step in enumerate(steps):
                if step % 3 == _Run._RECEIVE:
                    takes[step // 3].append(position)
        return takes


_WORK = {ir.FORWARD: 1, ir.FULL_BACKWARD: 2, ir.BACKWARD_INPUT: 1, ir.BACKWARD_WEIGHT: 1}


def _most_between(begins: Sequence[int], ends: Sequence[int]) -> int:
    """Of messages that lie from one moment to another, both in the messages' sequence, the most that lie at once."""
    most = ended = 0
    for number, begin in enumerate(begins):
        while ended < len(ends) and ends[ended] <= begin:
            ended += 1
        most = max(most, number + 1 - ended)
    return most


def _steps(
    actions: Sequence[Action], happens: Mapping[ActionType, Sequence[tuple[int, ...]]], peaks: list[int]
) -> tuple[list[int], list[int]]:
    """A rank's actions as steps, and the work before each; raises rows' peaks to the most messages alive at once."""
    result: list[int] = []
    work: list[int] = []
    alive = [0] * len(peaks)
    to_do = 0
    for action in actions:
        for stage, kind, _, _ in action[3] or (action,):
            if kind not in happens:
                continue
            to_do += _WORK.get(kind, 0)
            for step in happens[kind][stage]:
                result.append(step)
                work.append(to_do)
                to_do = 0
                row, what = divmod(step, 3)
                if what == _Run._RECEIVE:
                    alive[row] += 1
                    if alive[row] > peaks[row]:
                        peaks[row] = alive[row]
                elif what == _Run._FREE:
                    alive[row] -= 1
    return result, work
