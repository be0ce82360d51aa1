"""One forward, one backward: a rank holds no more activations than there are ranks after it, and one.

Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", 2019, arXiv:1806.03377; without weight
stashing, as "PipeDream-Flush" in arXiv:2006.09503.
"""

from __future__ import annotations

from pp_runtime.orders.alternation import alternate
from pp_runtime.orders.ir import Order
from pp_runtime.orders.limits import require_stages_per_rank


def one_f_one_b(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The order of 1F1B, one stage a rank; at most ``num_ranks - rank`` activations on a rank."""
    require_stages_per_rank("1F1B", num_ranks, num_stages, num_microbatches, stages=1)
    order: Order = {}
    for rank in range(num_ranks):
        work = [(rank, microbatch) for microbatch in range(num_microbatches)]
        order[rank] = alternate(work, work, ahead=min(num_ranks - 1 - rank, num_microbatches))
    return order
