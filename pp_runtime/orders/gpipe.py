"""All forwards, then all backwards.

Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", 2019, arXiv:1811.06965.
"""

from __future__ import annotations

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action, Order
from pp_runtime.orders.limits import require_stages_per_rank


def gpipe(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The order of GPipe, one stage a rank."""
    require_stages_per_rank("GPipe", num_ranks, num_stages, num_microbatches, stages=1)
    microbatches = range(num_microbatches)
    return {
        rank: [Action(rank, kind, microbatch) for kind in (ir.FORWARD, ir.FULL_BACKWARD) for microbatch in microbatches]
        for rank in range(num_ranks)
    }
