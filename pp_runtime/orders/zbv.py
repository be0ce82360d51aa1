"""Zero bubble in a V: two stages a rank, down the ranks and up again, with 1F1B's memory.

Qi et al., "Zero Bubble Pipeline Parallelism", 2023, arXiv:2401.10241, and
"Pipeline Parallelism with Controllable Memory", 2024, arXiv:2405.15362, where it is V-ZB: the V with full memory.
"""

from __future__ import annotations

from pp_runtime.orders import ir
from pp_runtime.orders.chunks import ChunkActions, without_surplus
from pp_runtime.orders.ir import Action, Order
from pp_runtime.orders.limits import require_stages_per_rank


def zbv(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The ZB-V order on V-shaped stages, for any number of microbatches."""
    require_stages_per_rank("ZBVZeroBubble", num_ranks, num_stages, num_microbatches, stages=2)
    # The pattern needs this many to have all its phases; what is too many is taken out again.
    planned = max(2 * num_ranks - 1, num_microbatches)
    return without_surplus(
        {rank: _rank_actions(rank, num_ranks, num_stages, planned) for rank in range(num_ranks)}, num_microbatches
    )


def _rank_actions(rank: int, num_ranks: int, num_stages: int, num_microbatches: int) -> list[Action]:
    chunks = ChunkActions(down=rank, up=num_stages - 1 - rank)
    down, up = chunks.down, chunks.up
    # Forwards ahead: enough that the first microbatch has gone down and up again.
    chunks.add(2 * (num_ranks - rank) - 1, (down, ir.FORWARD))
    chunks.add(rank, (up, ir.FORWARD), (down, ir.FORWARD))
    chunks.add(num_ranks - rank, (up, ir.FORWARD), (up, ir.BACKWARD_INPUT), (up, ir.BACKWARD_WEIGHT))
    # Six actions a microbatch, until every forward is done.
    forwards_left = num_microbatches - chunks.count(down, ir.FORWARD)
    down_backward, up_turn = (
        ((down, ir.BACKWARD_INPUT), (down, ir.BACKWARD_WEIGHT)),
        ((up, ir.FORWARD), (up, ir.BACKWARD_INPUT), (up, ir.BACKWARD_WEIGHT)),
    )
    chunks.add(forwards_left, (down, ir.FORWARD), *down_backward, *up_turn)
    chunks.add(num_microbatches - chunks.count(up, ir.FORWARD), *down_backward, *up_turn)
    # The rest: input gradients first, since other ranks wait for them.
    chunks.add(rank, (down, ir.BACKWARD_INPUT), (up, ir.BACKWARD_INPUT))
    chunks.add(num_ranks - rank, (down, ir.BACKWARD_INPUT), (down, ir.BACKWARD_WEIGHT))
    chunks.add(num_microbatches - chunks.count(up, ir.BACKWARD_WEIGHT), (up, ir.BACKWARD_WEIGHT))
    chunks.add(num_microbatches - chunks.count(down, ir.BACKWARD_WEIGHT), (down, ir.BACKWARD_WEIGHT))
    return chunks.actions
