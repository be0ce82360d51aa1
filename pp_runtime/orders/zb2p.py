"""No bubble between a rank's first and last action, for twice 1F1B's activations.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023, arXiv:2401.10241: the handcrafted schedule ZB-H2.
"""

from __future__ import annotations

from pp_runtime.orders.alternation import alternate_split
from pp_runtime.orders.ir import Order
from pp_runtime.orders.limits import require_stages_per_rank


def zb2p(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """ZB-H2, one stage a rank: at most ``2 * num_ranks - 1`` activations on every rank, bubble (p-1)(F+I-2W).

    A rank begins as late as its first activation comes and ends as much later, so the bubble counts idle time between a
    rank's own first and last action.
    """
    require_stages_per_rank("ZB2P", num_ranks, num_stages, num_microbatches, stages=1)
    order: Order = {}
    for rank in range(num_ranks):
        work = [(rank, microbatch) for microbatch in range(num_microbatches)]
        ahead = min(2 * (num_ranks - 1 - rank), num_microbatches)
        order[rank] = alternate_split(work, work, ahead, weight_delay=2 * rank)
    return order
