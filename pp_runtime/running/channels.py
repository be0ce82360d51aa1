"""Opens a runtime's channels: shared memory between CPU ranks of one host, c10d between all others.

An accelerator's channels go through c10d on lanes of their own.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.errors import PipelineUsageError
from pp_runtime.planning import Channel
from pp_runtime.running.agreement import Agreement, group_or_world
from pp_runtime.running.communicators import Communicators, check_sequences, chosen_communicators
from pp_runtime.running.lanes import lanes_for
from pp_runtime.running.oversight import Lookout

if TYPE_CHECKING:
    from pp_runtime.planning import Plan

TRANSPORTS = ("auto", "shared_memory", "c10d")

# A wait spins this long before it sleeps, where every rank has a core to itself.
_SPIN_NS = 500_000

# Tags are 31 bits; edges are numbered by their two stages.
_TAGS = 2**31
_MOST_STAGES = 2048
_TAGS_A_RUNTIME = 4 * _MOST_STAGES * _MOST_STAGES


@dataclass(frozen=True, slots=True)
class OpenChannels:
    """The ends of this rank's channels, how the ranks confirm the end of a step, and where each shows what it does.

    Without other ranks there is nobody to confirm it with or to show it to. On a CPU there are no lanes.
    """

    senders: dict[Channel, _C.SendChannel]
    receivers: dict[Channel, _C.ReceiveChannel]
    confirmation: _C.Confirmation | None
    lookout: Lookout | None
    lanes: _C.Lanes | None


def chosen_transport() -> str:
    """What the environment variable PP_RUNTIME_TRANSPORT asks for: auto (also when unset), shared_memory or c10d."""
    chosen = os.environ.get("PP_RUNTIME_TRANSPORT", "auto")
    if chosen not in TRANSPORTS:
        raise PipelineUsageError(f"PP_RUNTIME_TRANSPORT is {chosen!r}: choose one of {', '.join(TRANSPORTS)}")
    return chosen


def open_channels(
    agreement: Agreement,
    group: dist.ProcessGroup | None,
    device: torch.device,
    senders: Sequence[Channel],
    receivers: Sequence[Channel],
    plan: Plan,
) -> OpenChannels:
    """Open both tables of channels. Every rank of the group must call it, at the same point."""
    if agreement.size == 1:
        return OpenChannels({}, {}, None, None, None)
    chosen = chosen_transport()
    lanes = lanes_for(device)
    may_share = lanes is None and chosen != "c10d"
    credits, ahead = plan.credits(), plan.ahead()
    token = secrets.randbits(63)
    visible = _C.Token(token) if may_share else None
    offered = {
        channel: _C.SharedSendChannel(credits[channel], ahead[channel], channel.name, agreement.watch)
        for channel in senders
        if may_share
    }
    bells = _C.SharedConfirmation.make(agreement.size) if may_share and agreement.rank == 0 else None
    board = _C.Board.make(agreement.size) if may_share and agreement.rank == 0 else None
    words = agreement.exchange(
        "offer",
        {
            "pid": os.getpid(),
            "token": str(token),
            "fd": visible.fd if visible is not None else -1,
            "bells": bells.fd if bells is not None else -1,
            "board": board.fd if board is not None else -1,
            "cores": sorted(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "channels": {_key(channel): sender.fd for channel, sender in offered.items()},
        },
    )
    reached = [may_share and _C.Token.matches(word["pid"], word["fd"], int(word["token"])) for word in words]
    reach = [word["ranks"] for word in agreement.exchange("reach", {"ranks": reached})]
    everybody_shares = all(all(ranks) for ranks in reach)
    shared = [reach[agreement.rank][rank] and reach[rank][agreement.rank] for rank in range(agreement.size)]
    if chosen == "shared_memory" and not all(shared):
        raise PipelineUsageError(
            f"PP_RUNTIME_TRANSPORT=shared_memory, but rank {agreement.rank} does not share memory with rank "
            f"{shared.index(False)}: unset it to let c10d carry what shared memory cannot"
        )
    # Every rank works out the same: the ranks on its host are those it shares memory with.
    spin = _spin_ns([word for word, same_host in zip(words, shared, strict=True) if same_host])

    on_lanes = None
    if lanes is not None:
        for order in (plan.with_communication, plan.forward_only):
            check_sequences(order, plan.placement, plan.wiring.edges, chosen_communicators())
        communicators = Communicators(group, device, agreement.serial, agreement.rank, [*senders, *receivers])
        on_lanes = _OnLanes(lanes, communicators, credits)
    c10d = None if everybody_shares else _C10dChannels(agreement, group, device, on_lanes, ahead)

    def sender(channel: Channel) -> _C.SendChannel:
        if c10d is not None and not shared[channel.receiver]:
            return c10d.sender(channel)
        offered[channel].connect(channel.receiver, words[channel.receiver]["pid"], spin)
        return offered[channel]

    def receiver(channel: Channel) -> _C.ReceiveChannel:
        if c10d is not None and not shared[channel.sender]:
            return c10d.receiver(channel)
        word = words[channel.sender]
        fd = word["channels"][_key(channel)]
        return _C.SharedReceiveChannel(channel.sender, word["pid"], fd, channel.name, agreement.watch, spin)

    def confirmation() -> _C.Confirmation:
        if c10d is not None and not everybody_shares:
            return c10d.confirmation(agreement.size, agreement.rank)
        return _C.SharedConfirmation(
            words[0]["pid"], words[0]["bells"], agreement.size, agreement.rank, agreement.watch, spin
        )

    def lookout() -> Lookout:
        segment = (
            _C.Board.open(words[0]["pid"], words[0]["board"], agreement.size)
            if everybody_shares
            else _C.Board.make(agreement.size)
        )
        return Lookout(agreement, _C.Board(segment, agreement.size, agreement.rank), shared=everybody_shares)

    opened = OpenChannels(
        {channel: sender(channel) for channel in senders},
        {channel: receiver(channel) for channel in receivers},
        confirmation(),
        lookout(),
        lanes,
    )
    # The token and the offers must live until every peer has opened them.
    agreement.exchange("opened", {})
    return opened


@dataclass(frozen=True, slots=True)
class _OnLanes:
    """What channels on an accelerator need besides a path between the hosts."""

    lanes: _C.Lanes
    communicators: Communicators
    credits: Mapping[Channel, int]

    def path(self, channel: Channel) -> _C.LanePath:
        given = self.communicators
        slots = self.credits.get(channel, 2)
        return _C.LanePath(self.lanes, given.of(channel), given.peer(channel), slots, given.owned)


class _C10dChannels:
    """Makes the ends of channels that go through the process group; each channel has two tags of its own."""

    def __init__(
        self,
        agreement: Agreement,
        group: dist.ProcessGroup | None,
        device: torch.device,
        on_lanes: _OnLanes | None,
        ahead: Mapping[Channel, int],
    ) -> None:
        self._ahead = ahead
        self._on_lanes = on_lanes
        self._group = _with_host_messages(group_or_world(group), device)
        self._watch = agreement.watch
        self._guard = _C.WaitGuard(agreement.watch)
        self._device = device
        self._first_tag = agreement.serial * _TAGS_A_RUNTIME

    def sender(self, channel: Channel) -> _C.SendChannel:
        path = self._path(channel, channel.receiver)
        if self._on_lanes is not None:
            return _C.LaneSendChannel(path, self._on_lanes.path(channel), self._watch, self._guard)
        return _C.C10dSendChannel(path, self._watch, self._guard)

    def receiver(self, channel: Channel) -> _C.ReceiveChannel:
        path = self._path(channel, channel.sender)
        if self._on_lanes is not None:
            return _C.LaneReceiveChannel(path, self._on_lanes.path(channel), self._watch, self._guard)
        return _C.C10dReceiveChannel(path, self._watch, self._guard)

    def confirmation(self, ranks: int, own_rank: int) -> _C.Confirmation:
        # No edge leads from a stage to itself, so its number is free.
        path = _C.C10dPath(self._group, -1, self._tag(0, 0, False), self._device, "end of the step")
        return _C.C10dConfirmation(path, ranks, own_rank, self._guard)

    def _path(self, channel: Channel, peer: int) -> _C.C10dPath:
        tag = self._tag(channel.source, channel.destination, channel.backward)
        return _C.C10dPath(self._group, peer, tag, self._device, channel.name, self._ahead[channel])

    def _tag(self, source: int, destination: int, backward: bool) -> int:
        """Channels between the same two ranks are told apart by their stages."""
        number = (source * _MOST_STAGES + destination) * 2 + backward
        return (self._first_tag + 2 * number) % _TAGS


def _with_host_messages(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """The group, or, where it has no backend for host tensors, one that has."""
    if device.type == "cpu" or torch.device("cpu") in group._device_types:
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _key(channel: Channel) -> str:
    return f"{channel.source}>{channel.destination}{'b' if channel.backward else 'f'}"


def _spin_ns(words: Sequence[Mapping[str, Any]]) -> int:
    """How long to spin: not at all where ranks (with their compute threads) must share cores."""
    cores = set().union(*(word["cores"] for word in words))
    return _SPIN_NS if len(words) > 1 and sum(word["threads"] for word in words) <= len(cores) else 0
