"""A rank's channels: who reaches whose memory, and the ends that are made of that."""

from __future__ import annotations

from pp_runtime.running.channels.opening import OpenChannels, chosen_transport, open_channels

__all__ = ["OpenChannels", "chosen_transport", "open_channels"]
