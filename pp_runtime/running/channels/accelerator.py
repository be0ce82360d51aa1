"""Channels whose tensors lie on an accelerator: they go through memory of the receiver's device where both ends can map
it, else through a communicator; what describes them goes through a channel of the hosts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.errors import PipelineUsageError
from pp_runtime.planning import Channel, Plan
from pp_runtime.running.agreement import Agreement
from pp_runtime.running.channels.host import tag_of
from pp_runtime.running.channels.reach import Offers, Reach, key_of
from pp_runtime.running.communicators import (
    Communicators,
    check_sequences,
    chosen_communicators,
    fewest_communicators,
)
from pp_runtime.running.peer_memory import peer_memory_of


def chosen_peer_memory(device: torch.device, chosen: str) -> _C.PeerMemory | None:
    """What the transport that was asked for has use of; an error where it cannot do without."""
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


class AcceleratorChannels:
    """Puts the ends of a rank's channels on lanes, each around its host's channel."""

    def __init__(
        self,
        agreement: Agreement,
        group: dist.ProcessGroup | None,
        device: torch.device,
        lanes: _C.Lanes,
        offers: Offers,
        reach: Reach,
        plan: Plan,
    ) -> None:
        self._agreement, self._group, self._device, self._lanes = agreement, group, device, lanes
        self._offers, self._reach, self._plan = offers, reach, plan
        # Where tensors lie; of recorded lanes on the host, of others with the device's index.
        self._memory = device if device.type == "cpu" else lanes.device
        self._credits = plan.credits()

    def wrap(
        self, sends: Mapping[Channel, _C.SendChannel], receives: Mapping[Channel, _C.ReceiveChannel]
    ) -> tuple[dict[Channel, _C.SendChannel], dict[Channel, _C.ReceiveChannel]]:
        """Both tables with the tensors' way. Every rank must call it, at the same point."""
        near = self._reach.near
        far = [c for c in sends if not near[c.receiver]] + [c for c in receives if not near[c.sender]]
        mapped, carried = self._mapped(), self._carried(far) if far else None

        def between(peer: int) -> _Mapped | _Carried:
            return mapped if carried is None or near[peer] else carried

        made_sends = {channel: between(channel.receiver).sender(channel, host) for channel, host in sends.items()}
        made_receives = {channel: between(channel.sender).receiver(channel, host) for channel, host in receives.items()}
        warn_of_few_queues(self._device, made_sends, made_receives)
        return made_sends, made_receives

    def _mapped(self) -> _Mapped:
        return _Mapped(self._lanes, self._memory, self._offers, self._reach, self._credits, self._agreement.watch)

    def _carried(self, channels: Sequence[Channel]) -> _Carried:
        plan, agreement = self._plan, self._agreement
        orders = plan.with_communication, plan.forward_only
        kind = chosen_communicators()
        if kind == "auto":
            kind = fewest_communicators(orders, plan.placement, plan.edges)
        else:
            for order in orders:
                check_sequences(order, plan.placement, plan.edges, kind)
        made = Communicators(self._group, self._device, agreement.serial, agreement.rank, channels, kind)
        guard = _C.WaitGuard(agreement.watch)
        return _Carried(self._lanes, self._memory, made, self._credits, plan.ahead(), agreement.watch, guard)


@dataclass(frozen=True, slots=True)
class _Mapped:
    """Makes the ends of channels whose tensors go through memory of the receiver's device."""

    lanes: _C.Lanes
    memory: torch.device
    offers: Offers
    reach: Reach
    credits: Mapping[Channel, int]
    watch: _C.Watch

    def sender(self, channel: Channel, host: _C.SendChannel) -> _C.SendChannel:
        device, control = self.reach.words[channel.receiver]["device"], self.offers.controls[channel]
        credits, spin_ns = self.credits[channel], self.reach.spin_ns
        return _C.DeviceSendChannel(host, self._path(channel), control, device, credits, self.watch, spin_ns)

    def receiver(self, channel: Channel, host: _C.ReceiveChannel) -> _C.ReceiveChannel:
        word = self.reach.words[channel.sender]
        control = word["controls"][key_of(channel)]
        return _C.DeviceReceiveChannel(host, self._path(channel), channel.sender, word["pid"], control, self.watch)

    def _path(self, channel: Channel) -> _C.DevicePath:
        return _C.DevicePath(self.lanes, channel.name, self.memory, self.offers.peer_memory)


@dataclass(frozen=True, slots=True)
class _Carried:
    """Makes the ends of channels whose tensors a communicator carries."""

    lanes: _C.Lanes
    memory: torch.device
    communicators: Communicators
    credits: Mapping[Channel, int]
    ahead: Mapping[Channel, int]
    watch: _C.Watch
    guard: _C.WaitGuard

    def sender(self, channel: Channel, host: _C.SendChannel) -> _C.SendChannel:
        return _C.CommunicatorSendChannel(host, self._path(channel, self.ahead[channel]), self.watch, self.guard)

    def receiver(self, channel: Channel, host: _C.ReceiveChannel) -> _C.ReceiveChannel:
        return _C.CommunicatorReceiveChannel(host, self._path(channel, self.credits[channel]), self.watch, self.guard)

    def _path(self, channel: Channel, slots: int) -> _C.CommunicatorPath:
        given = self.communicators
        return _C.CommunicatorPath(
            self.lanes,
            channel.name,
            self.memory,
            given.of(channel),
            given.peer(channel),
            tag_of(channel),
            slots,
            given.owned,
        )


def warn_of_few_queues(device: torch.device, sends: Mapping[Any, Any], receives: Mapping[Any, Any]) -> None:
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
