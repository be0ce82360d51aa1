"""Opens a runtime's channels: memory that both ends map where they are on one host, c10d between all others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.errors import PipelineUsageError
from pp_runtime.planning import Channel, Plan
from pp_runtime.running.agreement import Agreement
from pp_runtime.running.channels.accelerator import AcceleratorChannels, chosen_peer_memory
from pp_runtime.running.channels.host import HostChannels
from pp_runtime.running.channels.reach import Offers, Reach
from pp_runtime.running.communicators import chosen_communicators
from pp_runtime.running.lanes import lanes_for
from pp_runtime.running.oversight import Lookout

TRANSPORTS = ("auto", "shared_memory", "device", "c10d")


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
    chosen = chosen_transport()
    chosen_communicators()  # only accelerators have some; a value that nobody knows is refused on the laptop too
    if agreement.size == 1:
        return OpenChannels({}, {}, None, None, None)
    lanes = lanes_for(device)
    if chosen == ("device" if lanes is None else "shared_memory"):
        raise PipelineUsageError(
            f"PP_RUNTIME_TRANSPORT={chosen} is not for stages on {device.type}: set it to "
            f"{'shared_memory' if lanes is None else 'device'}, c10d or auto"
        )
    peer_memory = None if lanes is None else chosen_peer_memory(device, chosen)
    ahead = plan.ahead()
    offers = Offers(agreement, senders, plan.credits(), ahead, peer_memory, may_share=chosen != "c10d")
    reach = Reach.find(agreement, offers)
    reached = reach.shared if lanes is None else reach.near
    if chosen in ("shared_memory", "device") and not all(reached):
        raise PipelineUsageError(
            f"PP_RUNTIME_TRANSPORT={chosen}, but rank {agreement.rank} does not share memory with rank "
            f"{reached.index(False)}: unset it to let c10d carry what cannot go through memory of both"
        )
    host = HostChannels(agreement, group, offers, reach, ahead)
    sends = {channel: host.sender(channel) for channel in senders}
    receives = {channel: host.receiver(channel) for channel in receivers}
    if lanes is not None:
        on_lanes = AcceleratorChannels(agreement, group, device, lanes, offers, reach, plan)
        sends, receives = on_lanes.wrap(sends, receives)
    opened = OpenChannels(sends, receives, host.confirmation(), host.lookout(), lanes)
    # The offers must live until every peer has opened them.
    agreement.exchange("opened", {})
    return opened
