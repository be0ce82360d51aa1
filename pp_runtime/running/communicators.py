"""The communicators that an accelerator's channels send through, all made before the first step.

A communicator does its sends and receives one after another, on both ends in one sequence. NCCL gives two ranks one
communicator, so an activation on its way one way would stand before a gradient on its way back, which its receiver
waits for. So there are several between two ranks; ``PP_RUNTIME_COMMUNICATORS`` chooses how many:

pair        one for all messages from one rank to another
direction   one for all activations from one rank to another, one for all gradients
edge        one a channel: an edge and a direction
shared      the process group's own

Each takes memory and time to connect, so the first that the order allows is taken unless another is asked for: where
two ranks send and receive in one sequence, what waits in a communicator is what its receiver comes to next.

How one is made depends on the backend: NCCL and gloo are known, others are made known by :func:`register_communicator`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import Edge, Order, Placement, ir
from pp_runtime.planning import Channel
from pp_runtime.running.agreement import group_or_world

KINDS = ("auto", "pair", "direction", "edge", "shared")


class MakesCommunicator(Protocol):
    """Makes a backend of two ranks, on both of them at the same point; it may wait for the other rank.

    The store is theirs alone; ``name`` is of no other communicator; ``global_ranks`` are the two in the world, in the
    order of their ranks in the communicator.
    """

    def __call__(self, store: Any, rank: int, size: int, *, name: str, global_ranks: Sequence[int]) -> Any: ...


_makers: dict[str, MakesCommunicator] = {}


def register_communicator(backend: str, make: MakesCommunicator) -> None:
    """Let channels have communicators of their own where the process group's backend calls itself ``backend``.

    A communicator is a c10d ``Backend`` that sends and receives as NCCL's does: it queues behind the current stream,
    ``wait()`` of its works makes the current stream wait and not the host, and ``abort()`` lets go of streams that
    wait for a peer. Registering a name again replaces it.
    """
    _makers[backend] = make


def _make_nccl(store: Any, rank: int, size: int, *, name: str, global_ranks: Sequence[int]) -> Any:
    options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.group_name = name
    options.global_ranks_in_group = list(global_ranks)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _make_gloo(store: Any, rank: int, size: int, **_: Any) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, dist.distributed_c10d.default_pg_timeout)


register_communicator("nccl", _make_nccl)
register_communicator("gloo", _make_gloo)

Key = tuple[int, ...]
Message = tuple[int, int, bool, int | None]


def chosen_communicators() -> str:
    """What the environment variable PP_RUNTIME_COMMUNICATORS asks for: auto (also when unset), or one of the others."""
    chosen = os.environ.get("PP_RUNTIME_COMMUNICATORS", "auto")
    if chosen not in KINDS:
        raise PipelineUsageError(f"PP_RUNTIME_COMMUNICATORS is {chosen!r}: choose one of {', '.join(KINDS)}")
    return chosen


def key_of(kind: str, channel: Channel) -> Key:
    """Channels with the same key share a communicator. Keys sort alike on every rank."""
    if kind == "edge":
        return (channel.source, channel.destination, int(channel.backward))
    if kind == "direction":
        return (channel.sender, channel.receiver, int(channel.backward))
    if kind == "pair":
        return (channel.sender, channel.receiver)
    return (min(channel.sender, channel.receiver), max(channel.sender, channel.receiver))


class Communicators:
    """Makes this rank's communicators, in the one order in which every rank makes its own.

    ``serial`` tells the runtimes of one group apart. A communicator connects at its first message, and waits for its
    peer meanwhile; so each carries one here, where all ranks come to them in the same order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        serial: int,
        rank: int,
        channels: Iterable[Channel],
        kind: str,
    ) -> None:
        self._kind = kind
        self._rank = rank
        self._group = group_or_world(group)
        self._own = self._group._get_backend(device)
        self._made: dict[Key, Any] = {}
        first_of = sorted({key_of(self._kind, channel): channel for channel in channels}.items())
        for key, channel in first_of:
            self._made[key] = self._make(f"pp_runtime/{serial}/communicator/{'-'.join(map(str, key))}", channel)
        # All are under way at once, where a backend connects in the background.
        for work, _ in [self._meet(key, channel, device) for key, channel in first_of]:
            work.wait()
        if device.type != "cpu" and first_of:
            torch.accelerator.synchronize(device)

    def of(self, channel: Channel) -> Any:
        """The backend that carries the channel."""
        return self._made[key_of(self._kind, channel)]

    def peer(self, channel: Channel) -> int:
        """The other end's rank in that backend."""
        other = channel.receiver if self._rank == channel.sender else channel.sender
        return other if self._kind == "shared" else int(other > self._rank)

    @property
    def owned(self) -> bool:
        """Whether they were made here, and not given."""
        return self._kind != "shared"

    def _make(self, name: str, channel: Channel) -> Any:
        if self._kind == "shared":
            return self._own
        store: Any = dist.distributed_c10d._get_process_group_store(self._group)
        prefixed = dist.PrefixStore(name, store.clone())
        pair = sorted((channel.sender, channel.receiver))
        backend = self._own.name()
        make = _makers.get(backend)
        if make is None:
            raise PipelineUsageError(
                f"pp_runtime does not know how to make communicators of the backend {backend!r}: set "
                "PP_RUNTIME_COMMUNICATORS=shared, or call pp_runtime.running.register_communicator for it"
            )
        global_ranks = [dist.get_global_rank(self._group, rank) for rank in pair]
        return make(prefixed, pair.index(self._rank), 2, name=name, global_ranks=global_ranks)

    def _meet(self, key: Key, channel: Channel, device: torch.device) -> tuple[Any, torch.Tensor]:
        word = torch.zeros(1, device=device)
        # Of a shared pair's channels each rank may have come upon another; the lower rank sends.
        sends = self._rank == (key[0] if self._kind == "shared" else channel.sender)
        backend = self._made[key]
        return (backend.send if sends else backend.recv)([word], self.peer(channel), 0), word


def fewest_communicators(orders: Iterable[Order], placement: Placement, edges: Sequence[Edge]) -> str:
    """The kind with the fewest communicators that none of these orders, with their messages, would deadlock."""
    orders = list(orders)
    for kind in ("pair", "direction"):
        if all(_out_of_sequence(order, placement, edges, kind) is None for order in orders):
            return kind
    return "edge"


def check_sequences(order_with_comms: Order, placement: Placement, edges: Sequence[Edge], kind: str) -> None:
    """Raise PipelineUsageError where two ranks would use a communicator of this kind in different sequences."""
    found = _out_of_sequence(order_with_comms, placement, edges, kind)
    if found is not None:
        raise PipelineUsageError(
            f"PP_RUNTIME_COMMUNICATORS={kind}: ranks {found[0]} and {found[1]} send and receive in different sequences "
            "in this schedule, which would deadlock in one communicator: choose 'edge'"
        )


def _out_of_sequence(
    order_with_comms: Order, placement: Placement, edges: Sequence[Edge], kind: str
) -> tuple[int, int] | None:
    """Two ranks that would use a communicator of this kind in different sequences, or None."""
    if kind == "edge":
        return None  # verified for every order
    leaving: dict[int, list[Edge]] = {}
    arriving: dict[int, list[Edge]] = {}
    for edge in edges:
        if placement[edge.source] != placement[edge.destination]:
            leaving.setdefault(edge.source, []).append(edge)
            arriving.setdefault(edge.destination, []).append(edge)
    sequences: dict[Key, dict[int, list[Message]]] = {}
    for rank, actions in order_with_comms.items():
        for stage, action, microbatch, _ in actions:
            if action not in (ir.SEND_F, ir.RECV_F, ir.SEND_B, ir.RECV_B):
                continue
            backward = action in (ir.SEND_B, ir.RECV_B)
            carrying = leaving if action in (ir.SEND_F, ir.RECV_B) else arriving
            for edge in carrying.get(stage, ()):
                ends = placement[edge.source], placement[edge.destination]
                sender, receiver = reversed(ends) if backward else ends
                key = key_of(kind, Channel(edge.source, edge.destination, backward, sender, receiver))
                message = (edge.source, edge.destination, backward, microbatch)
                sequences.setdefault(key, {}).setdefault(rank, []).append(message)
    for ends_of in sequences.values():
        (rank, ours), (other, theirs) = ends_of.items()
        if ours != theirs:
            return rank, other
    return None
