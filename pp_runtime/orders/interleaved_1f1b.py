"""1F1B with several stages a rank that take turns, which divides the bubble by their number.

Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021,
arXiv:2104.04473.
"""

from __future__ import annotations

from pp_runtime.orders.alternation import alternate, depth_first_work
from pp_runtime.orders.ir import Order
from pp_runtime.orders.limits import require_equal_stages


def interleaved_1f1b(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The interleaved order on looped stages, for any number of microbatches."""
    require_equal_stages("Interleaved1F1B", num_ranks, num_stages, num_microbatches)
    order: Order = {}
    for rank in range(num_ranks):
        forwards, backwards, ahead = depth_first_work(num_ranks, num_stages, num_microbatches, rank)
        # A forward takes a step to the next rank and its backward a step back, so each rank is two more ahead.
        ahead = min(ahead + 2 * (num_ranks - 1 - rank), len(forwards))
        order[rank] = alternate(forwards, backwards, ahead)
    return order
