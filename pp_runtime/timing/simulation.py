"""When each action of an order runs, if actions take given times: event simulation in time linear in the actions."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, Edge, Placement, ir, leaves, placement_of
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.network import Channel, Network, has_communication
from pp_runtime.timing.peaks import activation_peaks, slot_peaks
from pp_runtime.timing.timeline import Span, Timeline


@dataclass(frozen=True)
class Simulation:
    """A simulated step. Times are in the unit of the costs; ``starts[rank][i]`` belongs to ``order[rank][i]``."""

    order: Mapping[int, Sequence[Action]]
    costs: Costs
    network: Network = field(repr=False)
    starts: Mapping[int, Sequence[float]] = field(repr=False)
    ends: Mapping[int, Sequence[float]] = field(repr=False)

    @cached_property
    def makespan(self) -> float:
        """From the start of the step to the end of the last action of any rank."""
        return max((ends[-1] for ends in self.ends.values() if len(ends)), default=0.0)

    def busy(self, rank: int) -> float:
        """How long the rank computes."""
        return self._busy[rank]

    def idle(self, rank: int) -> float:
        """How long the rank does nothing, from the start of the step to its makespan."""
        return self.makespan - self._occupied[rank]

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they do not compute: ``(p-1)/(m+p-1)`` for 1F1B and GPipe."""
        return _share(sum(self._busy.values()), self.makespan * len(self.order))

    @property
    def repeated_bubble(self) -> float:
        """The bubble of step after step, where a rank begins its next one without waiting for the others.

        This is the number that the zero-bubble papers give: the time of a step is then that of the rank whose own
        actions, first start to last end, take longest.
        """
        longest = max((ends[-1] - self.starts[rank][0] for rank, ends in self.ends.items() if len(ends)), default=0.0)
        return _share(sum(self._busy.values()), longest * len(self.order))

    @cached_property
    def activations(self) -> dict[int, float]:
        """The most activations that each rank holds at once (:func:`pp_runtime.timing.peaks.activation_peaks`)."""
        return activation_peaks(self.order)

    @cached_property
    def slots(self) -> dict[int, int]:
        """The most received messages that each rank holds at once (:func:`pp_runtime.timing.peaks.slot_peaks`)."""
        return slot_peaks(self.order, self.starts, self.ends, self.network)

    def timeline(self) -> Timeline:
        """The same as spans, to be drawn or written as a measured timeline is."""
        return Timeline(
            tuple(
                Span(rank, str(action), start, end, 0.0)
                for rank, actions in self.order.items()
                for action, start, end in zip(actions, self.starts[rank], self.ends[rank], strict=True)
                if end > start or action.computation_type in ir.COMPUTE_TYPES
            )
        )

    @cached_property
    def _busy(self) -> dict[int, float]:
        durations = self.costs.table(len(self.network.remote_forward))
        return {
            rank: sum(
                self.costs.overlap * sum(durations[part[1]._value_][part[0]] for part in parts)
                if parts is not None
                else durations[kind._value_][stage]
                for stage, kind, _, parts in actions
                if kind._value_ in _COMPUTE_TEXTS
            )
            for rank, actions in self.order.items()
        }

    @cached_property
    def _occupied(self) -> dict[int, float]:
        return {
            rank: sum(ends) - sum(starts)
            for (rank, ends), starts in zip(self.ends.items(), self.starts.values(), strict=True)
        }


_COMPUTE_TEXTS = frozenset(kind.value for kind in ir.COMPUTE_TYPES)


def _share(busy: float, total: float) -> float:
    return max(0.0, 1.0 - busy / total) if total > 0 else 0.0


class PlannedOrder(Protocol):
    """An order whose messages are placed: :class:`pp_runtime.planning.Plan`."""

    @property
    def placement(self) -> Placement: ...

    @property
    def edges(self) -> Iterable[Edge]: ...

    @property
    def with_communication(self) -> Mapping[int, Sequence[Action]]: ...


def simulate(
    order: Mapping[int, Sequence[Action]] | PlannedOrder,
    costs: Costs | None = None,
    *,
    placement: Placement | None = None,
    edges: Iterable[Edge] | None = None,
) -> Simulation:
    """Play an order, with or without sends and receives, or a plan, which brings its placement and edges.

    An action starts when the rank has ended the one before it and all that it reads has arrived. Sends never block,
    a receive is posted at its place and waited for by the action that uses it. InvalidOrderError names the first
    action of each rank that can never start; an order that :func:`pp_runtime.planning.verify` accepts has none.
    """
    if not isinstance(order, Mapping):
        placement, edges, order = order.placement, order.edges, order.with_communication
    costs = costs or Costs()
    placement = placement_of(order) if placement is None else placement
    network = Network(placement, edges, costs, explicit=has_communication(order))
    return _Player(order, costs, network).play()


class _Player:
    """The state of one simulation: a place and a clock a rank. A rank that must wait is resumed by the message."""

    def __init__(self, order: Mapping[int, Sequence[Action]], costs: Costs, network: Network) -> None:
        self.order = order
        self.costs = costs
        self.network = network
        self.durations = costs.table(len(network.remote_forward))
        self.starts = {rank: array("d") for rank in order}
        self.ends = {rank: array("d") for rank in order}

    def play(self) -> Simulation:
        resumed = sorted(self.order, reverse=True)
        while resumed:
            self._advance(resumed.pop(), resumed)
        self._refuse_unfinished()
        return Simulation(self.order, self.costs, self.network, self.starts, self.ends)

    def _advance(self, rank: int, resumed: list[int]) -> None:
        """Play the rank until it ends or must wait; append the ranks whose awaited message it sent."""
        actions, starts, ends = self.order[rank], self.starts[rank], self.ends[rank]
        reads, sends, durations = self.network.reads, self.network.sends, self.durations
        now = ends[-1] if ends else 0.0
        for place in range(len(ends), len(actions)):
            stage, kind, microbatch, parts = actions[place]
            if parts is not None:
                ready = self._play_overlap(parts, now, resumed)
                if ready is None:
                    return
                starts.append(ready[0])
                ends.append(ready[1])
                now = ready[1]
                continue
            text = kind._value_
            for channel in reads[text][stage]:
                arrival = channel.arrivals.get(microbatch)
                if arrival is None:
                    channel.awaited = microbatch
                    return
                if arrival > now:
                    now = arrival
            starts.append(now)
            now += durations[text][stage]
            ends.append(now)
            for channel in sends[text][stage]:
                if channel.deliver(microbatch, now):
                    resumed.append(channel.receiver)

    def _play_overlap(self, parts: Sequence[Action], now: float, resumed: list[int]) -> tuple[float, float] | None:
        """Start and end of sub-actions that run as one: all read first, all send at the end; None to wait."""
        made = {channel for part in parts for channel in self.network.sends[part[1]._value_][part[0]]}
        for stage, kind, microbatch, _ in parts:
            for channel in self.network.reads[kind._value_][stage]:
                arrival = channel.arrivals.get(microbatch)
                if arrival is None and channel in made and self._made_by_parts(channel, microbatch, parts):
                    continue
                if arrival is None:
                    channel.awaited = microbatch
                    return None
                now = max(now, arrival)
        end = now + self.costs.overlap * sum(self.durations[kind._value_][stage] for stage, kind, _, _ in parts)
        for stage, kind, microbatch, _ in parts:
            for channel in self.network.sends[kind._value_][stage]:
                if channel.deliver(microbatch, end):
                    resumed.append(channel.receiver)
        return now, end

    def _made_by_parts(self, channel: Channel, microbatch: int | None, parts: Sequence[Action]) -> bool:
        """Whether one part reads what another part of the same rank makes."""
        return not channel.remote and any(
            channel in self.network.sends[kind._value_][stage] and other == microbatch
            for stage, kind, other, _ in parts
        )

    def _refuse_unfinished(self) -> None:
        stopped = []
        for rank, actions in self.order.items():
            if len(self.ends[rank]) < len(actions):
                action = actions[len(self.ends[rank])]
                missing = [
                    f"{channel.source}{'F' if kind._value_ == 'F' else 'B'}{microbatch}"
                    for stage, kind, microbatch, _ in leaves([action])
                    for channel in self.network.reads[kind._value_][stage]
                    if microbatch not in channel.arrivals
                ]
                stopped.append(f"rank {rank} waits in {action} for {' and '.join(missing)}")
        if stopped:
            raise InvalidOrderError(f"The order never ends: {'; '.join(stopped)}.")
