"""Breadth first: a rank runs all microbatches through one of its stages, then through its next.

Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2023, arXiv:2211.05953.
"""

from __future__ import annotations

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action, Order
from pp_runtime.orders.limits import require_counts


def looped_bfs(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The breadth-first order on looped stages; ranks may hold unequally many."""
    require_counts("LoopedBFS", num_ranks, num_stages, num_microbatches)
    microbatches = range(num_microbatches)
    order: Order = {}
    for rank in range(num_ranks):
        stages = range(rank, num_stages, num_ranks)
        forwards = [Action(stage, ir.FORWARD, microbatch) for stage in stages for microbatch in microbatches]
        backwards = [
            Action(stage, ir.FULL_BACKWARD, microbatch)
            for stage in reversed(stages)
            for microbatch in reversed(microbatches)
        ]
        order[rank] = forwards + backwards
    return order
