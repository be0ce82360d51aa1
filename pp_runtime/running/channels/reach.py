"""What the ranks of a host offer each other before their channels are opened, and who can reach whose memory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pp_runtime import _C
from pp_runtime.planning import Channel
from pp_runtime.running.agreement import Agreement

# A wait spins this long before it sleeps, where every rank has a core to itself.
_SPIN_NS = 500_000


class Offers:
    """What this rank makes for others to open. It must live until they have."""

    def __init__(
        self,
        agreement: Agreement,
        senders: Sequence[Channel],
        credits: Mapping[Channel, int],
        ahead: Mapping[Channel, int],
        peer_memory: _C.PeerMemory | None,
        *,
        may_share: bool,
    ) -> None:
        self.may_share, self.peer_memory = may_share, peer_memory
        self._number = secrets.randbits(63)
        self._token = _C.Token(self._number) if may_share else None
        self._page = None if peer_memory is None else _C.PeerPage(peer_memory)
        self.senders = {
            channel: _C.SharedSendChannel(credits[channel], ahead[channel], channel.name, agreement.watch)
            for channel in senders
            if may_share
        }
        self.controls = {c: _C.DeviceSendChannel.make_control() for c in senders if peer_memory is not None}
        keeps = may_share and agreement.rank == 0
        self._bells = _C.SharedConfirmation.make(agreement.size) if keeps else None
        self._board = _C.Board.make(agreement.size) if keeps else None

    def word(self) -> dict[str, Any]:
        """What the other ranks are told."""
        return {
            "pid": os.getpid(),
            "token": str(self._number),
            "fd": _fd(self._token),
            "page": _fd(self._page),
            "device": "" if self.peer_memory is None else self.peer_memory.name,
            "bells": _fd(self._bells),
            "board": _fd(self._board),
            "cores": sorted(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "channels": {key_of(channel): sender.fd for channel, sender in self.senders.items()},
            "controls": {key_of(channel): control.fd for channel, control in self.controls.items()},
        }


@dataclass(frozen=True, slots=True)
class Reach:
    """What every rank offered, and with whom this one shares memory, of the host and of the devices, both ways."""

    words: Sequence[Mapping[str, Any]]
    shared: Sequence[bool]
    near: Sequence[bool]
    everybody_shares: bool
    spin_ns: int

    @staticmethod
    def find(agreement: Agreement, offers: Offers) -> Reach:
        """Every rank of the group must call it, at the same point."""
        words = agreement.exchange("offer", offers.word())
        reached = [offers.may_share and _C.Token.matches(word["pid"], word["fd"], int(word["token"])) for word in words]
        device = offers.peer_memory
        mapped = [
            device is not None and is_reached and _C.PeerPage.opens(device, word["pid"], word["page"], word["device"])
            for word, is_reached in zip(words, reached, strict=True)
        ]
        told = agreement.exchange("reach", {"ranks": reached, "devices": mapped})
        shared = _both_ways(told, "ranks", agreement.rank)
        return Reach(
            words,
            shared,
            _both_ways(told, "devices", agreement.rank),
            everybody_shares=all(all(word["ranks"]) for word in told),
            # Every rank works out the same: the ranks on its host are those it shares memory with.
            spin_ns=_spin_ns([word for word, same_host in zip(words, shared, strict=True) if same_host]),
        )


def key_of(channel: Channel) -> str:
    """Names a channel in what the ranks tell each other."""
    return f"{channel.source}>{channel.destination}{'b' if channel.backward else 'f'}"


def _fd(made: Any) -> int:
    return -1 if made is None else made.fd


def _both_ways(reach: Sequence[Mapping[str, Any]], what: str, rank: int) -> list[bool]:
    """For each rank, whether it and this one reach each other."""
    return [bool(reach[rank][what][other] and reach[other][what][rank]) for other in range(len(reach))]


def _spin_ns(words: Sequence[Mapping[str, Any]]) -> int:
    """How long to spin: not at all where ranks (with their compute threads) must share cores."""
    cores = set().union(*(word["cores"] for word in words))
    return _SPIN_NS if len(words) > 1 and sum(word["threads"] for word in words) <= len(cores) else 0
