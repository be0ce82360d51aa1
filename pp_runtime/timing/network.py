"""Which stages exchange messages, and when each simulated message arrives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pp_runtime.orders import Action, Edge, Placement, adjacent_edges, ir
from pp_runtime.timing.costs import Costs


class Channel:
    """One direction of one edge. Between ranks it carries one message at a time; within a rank it takes no time."""

    __slots__ = ("arrivals", "awaited", "free_at", "receiver", "remote", "source", "transfer")

    def __init__(self, source: int, receiver: int, remote: bool, transfer: float) -> None:
        self.source = source  # stage that sends
        self.receiver = receiver  # rank that receives
        self.remote = remote
        self.transfer = transfer if remote else 0.0
        self.free_at = 0.0
        self.arrivals: dict[int | None, float] = {}  # microbatch -> time
        self.awaited: int | None = None  # microbatch that the receiver has stopped for

    def deliver(self, microbatch: int | None, now: float) -> bool:
        """Send at ``now``; whether the receiver had stopped for this message."""
        if self.remote:
            self.free_at = now = max(now, self.free_at) + self.transfer
        self.arrivals[microbatch] = now
        if self.awaited is not None and self.awaited == microbatch:
            self.awaited = None
            return True
        return False


class Network:
    """The channels of a set of edges, by what an action reads and what it sends.

    ``reads[type][stage]`` and ``sends[type][stage]`` are the channels of an action, by the text of its type. In an
    order without sends every compute action sends what it made; in one with them only to its own rank.
    """

    def __init__(self, placement: Placement, edges: Iterable[Edge] | None, costs: Costs, explicit: bool) -> None:
        stages = range(len(placement))
        self.explicit = explicit
        transfer = costs.by_stage("transfer", len(placement))
        forward_in: list[list[Channel]] = [[] for _ in stages]
        forward_out: list[list[Channel]] = [[] for _ in stages]
        backward_in: list[list[Channel]] = [[] for _ in stages]
        backward_out: list[list[Channel]] = [[] for _ in stages]
        for edge in adjacent_edges(len(placement)) if edges is None else edges:
            source, destination = edge.source, edge.destination
            remote = placement[source] != placement[destination]
            activations = Channel(source, placement[destination], remote, transfer[source])
            gradients = Channel(destination, placement[source], remote, transfer[source])
            forward_out[source].append(activations)
            forward_in[destination].append(activations)
            backward_out[destination].append(gradients)
            backward_in[source].append(gradients)
        nothing: list[list[Channel]] = [[] for _ in stages]
        self.remote_forward = _only(forward_out, remote=True)
        self.remote_backward = _only(backward_out, remote=True)
        self.remote_activations_in = [len(found) for found in _only(forward_in, remote=True)]
        self.remote_gradients_in = [len(found) for found in _only(backward_in, remote=True)]
        made_forward = _only(forward_out, remote=False) if explicit else forward_out
        made_backward = _only(backward_out, remote=False) if explicit else backward_out
        self.reads = dict.fromkeys(_OTHER_TYPES, nothing) | {"F": forward_in, "B": backward_in, "I": backward_in}
        self.sends = dict.fromkeys(_OTHER_TYPES, nothing) | {
            "F": made_forward,
            "B": made_backward,
            "I": made_backward,
            "SEND_F": self.remote_forward,
            "SEND_B": self.remote_backward,
        }


_OTHER_TYPES = ("W", "UNSHARD", "RESHARD", "REDUCE_GRAD", "SEND_F", "RECV_F", "SEND_B", "RECV_B")


def _only(channels: Sequence[Sequence[Channel]], *, remote: bool) -> list[list[Channel]]:
    return [[channel for channel in found if channel.remote is remote] for found in channels]


def has_communication(order: Mapping[int, Sequence[Action]]) -> bool:
    """Whether the order has sends or receives of its own."""
    return any(
        kind is ir.SEND_F or kind is ir.RECV_F or kind is ir.SEND_B or kind is ir.RECV_B
        for actions in order.values()
        for _, kind, _, _ in actions
    )
