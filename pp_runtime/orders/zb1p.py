"""1F1B's memory with a third of its bubble: weight gradients fill the rest.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023, arXiv:2401.10241: the handcrafted schedule ZB-H1.
"""

from __future__ import annotations

from pp_runtime.orders.alternation import alternate_split
from pp_runtime.orders.ir import Order
from pp_runtime.orders.limits import require_stages_per_rank


def zb1p(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """ZB-H1, one stage a rank: at most ``num_ranks`` activations on every rank, bubble (p-1)(F+I-W)."""
    require_stages_per_rank("ZB1P", num_ranks, num_stages, num_microbatches, stages=1)
    order: Order = {}
    for rank in range(num_ranks):
        work = [(rank, microbatch) for microbatch in range(num_microbatches)]
        ahead = min(num_ranks - 1 - rank, num_microbatches)
        order[rank] = alternate_split(work, work, ahead, weight_delay=rank)
    return order
