"""Channels between hosts' memories: shared memory on one host, c10d between hosts. A CPU's messages go through them
whole, of an accelerator's what describes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.planning import Channel
from pp_runtime.running.agreement import Agreement, group_or_world
from pp_runtime.running.channels.reach import Offers, Reach, key_of
from pp_runtime.running.oversight import Lookout

# Tags are 31 bits; edges are numbered by their two stages.
_TAGS = 2**31
_MOST_STAGES = 2048
_TAGS_A_RUNTIME = 4 * _MOST_STAGES * _MOST_STAGES


class HostChannels:
    """Makes the ends of a rank's channels, how ranks confirm the end of a step, and where each shows what it does."""

    def __init__(
        self,
        agreement: Agreement,
        group: dist.ProcessGroup | None,
        offers: Offers,
        reach: Reach,
        ahead: Mapping[Channel, int],
    ) -> None:
        self._agreement = agreement
        self._offers = offers
        self._reach = reach
        self._c10d = None if reach.everybody_shares else _C10dChannels(agreement, group, ahead)

    def sender(self, channel: Channel) -> _C.SendChannel:
        if self._c10d is not None and not self._reach.shared[channel.receiver]:
            return self._c10d.sender(channel)
        made = self._offers.senders[channel]
        made.connect(channel.receiver, self._reach.words[channel.receiver]["pid"], self._reach.spin_ns)
        return made

    def receiver(self, channel: Channel) -> _C.ReceiveChannel:
        if self._c10d is not None and not self._reach.shared[channel.sender]:
            return self._c10d.receiver(channel)
        word = self._reach.words[channel.sender]
        fd = word["channels"][key_of(channel)]
        watch = self._agreement.watch
        return _C.SharedReceiveChannel(channel.sender, word["pid"], fd, channel.name, watch, self._reach.spin_ns)

    def confirmation(self) -> _C.Confirmation:
        agreement, word = self._agreement, self._reach.words[0]
        if self._c10d is not None:
            return self._c10d.confirmation(agreement.size, agreement.rank)
        return _C.SharedConfirmation(
            word["pid"], word["bells"], agreement.size, agreement.rank, agreement.watch, self._reach.spin_ns
        )

    def lookout(self) -> Lookout:
        agreement, word, shared = self._agreement, self._reach.words[0], self._reach.everybody_shares
        size = agreement.size
        segment = _C.Board.open(word["pid"], word["board"], size) if shared else _C.Board.make(size)
        return Lookout(agreement, _C.Board(segment, size, agreement.rank), shared=shared)


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
        path = _C.C10dPath(self._group, -1, self._tag(0), "end of the step")
        return _C.C10dConfirmation(path, ranks, own_rank, self._guard)

    def _path(self, channel: Channel, peer: int) -> _C.C10dPath:
        tag = self._tag(tag_of(channel))
        return _C.C10dPath(self._group, peer, tag, channel.name, self._ahead[channel])

    def _tag(self, number: int) -> int:
        return (self._first_tag + 2 * number) % _TAGS


def tag_of(channel: Channel) -> int:
    """Channels between the same two ranks are told apart by their stages."""
    return (channel.source * _MOST_STAGES + channel.destination) * 2 + channel.backward


def _with_host_messages(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group, or, where it has no backend for host tensors, one that has."""
    if torch.device("cpu") in group._device_types:
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
