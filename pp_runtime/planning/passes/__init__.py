"""From orders to orders: where sends, receives, gathers and reductions are placed, and what they need room for."""

from __future__ import annotations

from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.passes.credits import ChannelKey, Limits, channel_limits
from pp_runtime.planning.passes.data_parallel import insert_reduce_grad, insert_unshard
from pp_runtime.planning.passes.defer import defer_receives
from pp_runtime.planning.passes.merge import merge_split_backward

__all__ = [
    "ChannelKey",
    "Limits",
    "channel_limits",
    "defer_receives",
    "insert_communication",
    "insert_reduce_grad",
    "insert_unshard",
    "merge_split_backward",
]
