"""Whether an order of compute actions can be run from its beginning to its end."""

from __future__ import annotations

from collections.abc import Iterable

from pp_runtime.orders import Edge, Order, Placement, ir, neighbours
from pp_runtime.planning.verifier.completeness import check_completeness
from pp_runtime.planning.verifier.deadlock import check_progress
from pp_runtime.planning.verifier.marking import refuse


def verify(
    order: Order,
    placement: Placement,
    num_microbatches: int,
    edges: Iterable[Edge] | None = None,
    *,
    forward_only: bool = False,
) -> None:
    """Raise InvalidOrderError unless every rank can run its actions to the end, each exactly once.

    ``order`` holds compute actions, and may hold UNSHARD, RESHARD and REDUCE_GRAD; ``edges`` are a chain's by default.
    Every stage needs F for every microbatch, and B, or I and then W, after it; with ``forward_only`` F and no backward.
    The two parts of an OVERLAP_F_B begin only when what both need from other stages is there. Linear in the number of
    actions.
    """
    for rank, actions in order.items():
        for position, action in enumerate(actions):
            if action[1] in ir.COMMUNICATION_TYPES:
                refuse(order, rank, position, "an order of compute actions has no communication in it.")
    check_completeness(order, placement, num_microbatches, forward_only=forward_only)
    around = neighbours(len(placement), edges)
    check_progress(order, placement, num_microbatches, around)
