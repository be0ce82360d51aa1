"""All forwards and nothing else: evaluation."""

from __future__ import annotations

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action, Order, Placement
from pp_runtime.orders.limits import require_counts
from pp_runtime.orders.placement import looped, stages_of_rank


def forward_only(num_ranks: int, num_stages: int, num_microbatches: int, placement: Placement | None = None) -> Order:
    """Every rank runs each microbatch through its stages, lowest stage first.

    A rank with several stages goes to its next stage after as many microbatches as there are ranks: by then the first
    of them has come back to it.
    """
    require_counts("ForwardOnly", num_ranks, num_stages, num_microbatches)
    where = looped(num_ranks, num_stages) if placement is None else placement
    order: Order = {}
    for rank in range(num_ranks):
        stages = stages_of_rank(where, rank)
        order[rank] = [
            Action(stage, ir.FORWARD, microbatch)
            for start in range(0, num_microbatches, num_ranks)
            for stage in stages
            for microbatch in range(start, min(start + num_ranks, num_microbatches))
        ]
    return order
