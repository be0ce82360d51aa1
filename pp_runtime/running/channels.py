"""Opens a runtime's channels: memory that both ends map where they are on one host, c10d between all others.

On a CPU a message lies in shared memory whole. An accelerator's tensors go on lanes of their own, through memory of the
receiver's device where both ends can map it, else through a communicator; what describes them goes between the hosts
as a CPU's messages do.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.errors import PipelineUsageError
from pp_runtime.planning import Channel
from pp_runtime.running.agreement import Agreement, group_or_world
from pp_runtime.running.communicators import Communicators, check_sequences, chosen_communicators, fewest_communicators
from pp_runtime.running.lanes import lanes_for
from pp_runtime.running.oversight import Lookout
from pp_runtime.running.peer_memory import peer_memory_of

if TYPE_CHECKING:
    from pp_runtime.planning import Plan

TRANSPORTS = ("auto", "shared_memory", "device", "c10d")

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
    """What the environment variable PP_RUNTIME_TRANSPORT asks for: auto (also when unset), or one of the others."""
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
    if chosen == ("device" if lanes is None else "shared_memory"):
        raise PipelineUsageError(
            f"PP_RUNTIME_TRANSPORT={chosen} is not for stages on {device.type}: set it to "
            f"{'shared_memory' if lanes is None else 'device'}, c10d or auto"
        )
    may_share = chosen != "c10d"
    peer_memory = _peer_memory(device, chosen) if lanes is not None else None
    credits, ahead = plan.credits(), plan.ahead()
    token = secrets.randbits(63)
    visible = _C.Token(token) if may_share else None
    page = None if peer_memory is None else _C.PeerPage(peer_memory)
    offered = {
        channel: _C.SharedSendChannel(credits[channel], ahead[channel], channel.name, agreement.watch)
        for channel in senders
        if may_share
    }
    controls = {channel: _C.DeviceSendChannel.make_control() for channel in senders if peer_memory is not None}
    bells = _C.SharedConfirmation.make(agreement.size) if may_share and agreement.rank == 0 else None
    board = _C.Board.make(agreement.size) if may_share and agreement.rank == 0 else None
    words = agreement.exchange(
        "offer",
        {
            "pid": os.getpid(),
            "token": str(token),
            "fd": visible.fd if visible is not None else -1,
            "page": page.fd if page is not None else -1,
            "device": peer_memory.name if peer_memory is not None else "",
            "bells": bells.fd if bells is not None else -1,
            "board": board.fd if board is not None else -1,
            "cores": sorted(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "channels": {_key(channel): sender.fd for channel, sender in offered.items()},
            "controls": {_key(channel): control.fd for channel, control in controls.items()},
        },
    )
    reached = [may_share and _C.Token.matches(word["pid"], word["fd"], int(word["token"])) for word in words]
    mapped = [
        peer_memory is not None and near and _C.PeerPage.opens(peer_memory, word["pid"], word["page"])
        for word, near in zip(words, reached, strict=True)
    ]
    reach = agreement.exchange("reach", {"ranks": reached, "devices": mapped})
    everybody_shares = all(all(word["ranks"]) for word in reach)
    shared = _both_ways(reach, "ranks", agreement.rank)
    near = _both_ways(reach, "devices", agreement.rank)
    if chosen in ("shared_memory", "device") and not all(near if lanes is not None else shared):
        other = (near if lanes is not None else shared).index(False)
        raise PipelineUsageError(
            f"PP_RUNTIME_TRANSPORT={chosen}, but rank {agreement.rank} does not share memory with rank {other}: unset "
            "it to let c10d carry what cannot go through memory of both"
        )
    # Every rank works out the same: the ranks on its host are those it shares memory with.
    spin = _spin_ns([word for word, same_host in zip(words, shared, strict=True) if same_host])
    c10d = None if everybody_shares else _C10dChannels(agreement, group, ahead)

    def host_sender(channel: Channel) -> _C.SendChannel:
        if c10d is not None and not shared[channel.receiver]:
            return c10d.sender(channel)
        offered[channel].connect(channel.receiver, words[channel.receiver]["pid"], spin)
        return offered[channel]

    def host_receiver(channel: Channel) -> _C.ReceiveChannel:
        if c10d is not None and not shared[channel.sender]:
            return c10d.receiver(channel)
        word = words[channel.sender]
        fd = word["channels"][_key(channel)]
        return _C.SharedReceiveChannel(channel.sender, word["pid"], fd, channel.name, agreement.watch, spin)

    sends: dict[Channel, _C.SendChannel] = {channel: host_sender(channel) for channel in senders}
    receives: dict[Channel, _C.ReceiveChannel] = {channel: host_receiver(channel) for channel in receivers}
    if lanes is not None:
        far = [c for c in (*senders, *receivers) if not near[c.receiver if c in sends else c.sender]]
        carried = _carried(agreement, group, device, lanes, far, plan) if far or not peer_memory else None
        for channel, host in sends.items():
            if carried is not None and not near[channel.receiver]:
                sends[channel] = carried.sender(channel, host)
            else:
                path = _C.DevicePath(lanes, channel.name, _memory_of(device, lanes), peer_memory)
                name = words[channel.receiver]["device"]
                sends[channel] = _C.DeviceSendChannel(
                    host, path, controls[channel], name, credits[channel], agreement.watch, spin
                )
        for channel, taken in receives.items():
            if carried is not None and not near[channel.sender]:
                receives[channel] = carried.receiver(channel, taken)
            else:
                path = _C.DevicePath(lanes, channel.name, _memory_of(device, lanes), peer_memory)
                word = words[channel.sender]
                receives[channel] = _C.DeviceReceiveChannel(
                    taken, path, channel.sender, word["pid"], word["controls"][_key(channel)], agreement.watch
                )

        _warn_of_few_queues(device, sends, receives)

    def confirmation() -> _C.Confirmation:
        if c10d is not None:
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

    opened = OpenChannels(sends, receives, confirmation(), lookout(), lanes)
    # The token, the page and the offers must live until every peer has opened them.
    agreement.exchange("opened", {})
    return opened


def _both_ways(reach: Sequence[Mapping[str, Any]], what: str, rank: int) -> list[bool]:
    """For each rank, whether it and this one reach each other."""
    return [bool(reach[rank][what][other] and reach[other][what][rank]) for other in range(len(reach))]


def _peer_memory(device: torch.device, chosen: str) -> _C.PeerMemory | None:
    if chosen == "c10d":
        return None
    if device.type == "cpu":  # recorded lanes
        return _C.RecordedPeerMemory() if chosen == "device" else None
    found = peer_memory_of(device)
    if found is None and chosen == "device":
        raise PipelineUsageError(
            f"PP_RUNTIME_TRANSPORT=device, but the memory of {device} cannot be mapped by another process: unset it to "
            "let a communicator carry the tensors"
        )
    return found


def _warn_of_few_queues(device: torch.device, sends: Mapping[Any, Any], receives: Mapping[Any, Any]) -> None:
    """Streams that share a hardware queue hold each other up; CUDA has 8 queues unless it is told otherwise."""
    if device.type != "cuda":
        return
    queues = int(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8"))
    device_ends = sum(isinstance(end, _C.DeviceReceiveChannel) for end in receives.values())
    streams = 1 + len(sends) + len(receives) + device_ends
    if streams > queues:
        warnings.warn(
            f"this rank's pipeline has {streams} streams on {device}, which has {queues} hardware queues "
            f"(CUDA_DEVICE_MAX_CONNECTIONS): streams that share one hold each other up. Set it to "
            f"{min(32, max(16, streams))} before the process first uses CUDA",
            stacklevel=2,
        )


def _memory_of(device: torch.device, lanes: _C.Lanes) -> torch.device:
    """Where tensors lie; of recorded lanes on the host, of others with the device's index."""
    return device if device.type == "cpu" else lanes.device


def _carried(
    agreement: Agreement,
    group: dist.ProcessGroup | None,
    device: torch.device,
    lanes: _C.Lanes,
    channels: Sequence[Channel],
    plan: Plan,
) -> _Carried:
    orders = plan.with_communication, plan.forward_only
    kind = chosen_communicators()
    if kind == "auto":
        kind = fewest_communicators(orders, plan.placement, plan.edges)
    else:
        for order in orders:
            check_sequences(order, plan.placement, plan.edges, kind)
    communicators = Communicators(group, device, agreement.serial, agreement.rank, channels, kind)
    memory = _memory_of(device, lanes)
    return _Carried(lanes, memory, communicators, plan.credits(), agreement.watch, _C.WaitGuard(agreement.watch))


@dataclass(frozen=True, slots=True)
class _Carried:
    """Makes the ends of channels whose tensors a communicator carries."""

    lanes: _C.Lanes
    memory: torch.device
    communicators: Communicators
    credits: Mapping[Channel, int]
    watch: _C.Watch
    guard: _C.WaitGuard

    def sender(self, channel: Channel, host: _C.SendChannel) -> _C.SendChannel:
        return _C.CommunicatorSendChannel(host, self._path(channel), self.watch, self.guard)

    def receiver(self, channel: Channel, host: _C.ReceiveChannel) -> _C.ReceiveChannel:
        return _C.CommunicatorReceiveChannel(host, self._path(channel), self.watch, self.guard)

    def _path(self, channel: Channel) -> _C.CommunicatorPath:
        given = self.communicators
        return _C.CommunicatorPath(
            self.lanes,
            channel.name,
            self.memory,
            given.of(channel),
            given.peer(channel),
            _tag_of(channel),
            self.credits.get(channel, 2),
            given.owned,
        )


class _C10dChannels:
    """Makes the ends of channels between hosts that go through the process group; each has two tags of its own."""

    def __init__(self, agreement: Agreement, group: dist.ProcessGroup | None, ahead: Mapping[Channel, int]) -> None:
        self._ahead = ahead
        self._group = _with_host_messages(group_or_world(group))
        self._watch = agreement.watch
        self._guard = _C.WaitGuard(agreement.watch)
        self._first_tag = agreement.serial * _TAGS_A_RUNTIME

    def sender(self, channel: Channel) -> _C.SendChannel:
        return _C.C10dSendChannel(self._path(channel, channel.receiver), self._watch, self._guard)

    def receiver(self, channel: Channel) -> _C.ReceiveChannel:
        return _C.C10dReceiveChannel(self._path(channel, channel.sender), self._watch, self._guard)

    def confirmation(self, ranks: int, own_rank: int) -> _C.Confirmation:
        # No edge leads from a stage to itself, so its number is free.
        path = _C.C10dPath(self._group, -1, self._tag(0), torch.device("cpu"), "end of the step")
        return _C.C10dConfirmation(path, ranks, own_rank, self._guard)

    def _path(self, channel: Channel, peer: int) -> _C.C10dPath:
        tag = self._tag(_tag_of(channel))
        return _C.C10dPath(self._group, peer, tag, torch.device("cpu"), channel.name, self._ahead[channel])

    def _tag(self, number: int) -> int:
        return (self._first_tag + 2 * number) % _TAGS


def _tag_of(channel: Channel) -> int:
    """Channels between the same two ranks are told apart by their stages."""
    return (channel.source * _MOST_STAGES + channel.destination) * 2 + channel.backward


def _with_host_messages(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group, or, where it has no backend for host tensors, one that has."""
    if torch.device("cpu") in group._device_types:
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _key(channel: Channel) -> str:
    return f"{channel.source}>{channel.destination}{'b' if channel.backward else 'f'}"


def _spin_ns(words: Sequence[Mapping[str, Any]]) -> int:
    """How long to spin: not at all where ranks (with their compute threads) must share cores."""
    cores = set().union(*(word["cores"] for word in words))
    return _SPIN_NS if len(words) > 1 and sum(word["threads"] for word in words) <= len(cores) else 0
