"""Interleaved 1F1B with the backward split, so that weight gradients fill the bubble.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023, arXiv:2401.10241: their ZB-H1 with several stages a rank.
"""

from __future__ import annotations

from pp_runtime.orders.alternation import alternate_split, depth_first_work
from pp_runtime.orders.ir import Order
from pp_runtime.orders.limits import require_equal_stages


def interleaved_zero_bubble(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The interleaved zero-bubble order on looped stages, for any number of microbatches."""
    require_equal_stages("InterleavedZeroBubble", num_ranks, num_stages, num_microbatches)
    order: Order = {}
    for rank in range(num_ranks):
        forwards, backwards, ahead = depth_first_work(num_ranks, num_stages, num_microbatches, rank)
        ahead = min(ahead + num_ranks - 1 - rank, len(forwards))
        order[rank] = alternate_split(forwards, backwards, ahead, weight_delay=rank)
    return order
