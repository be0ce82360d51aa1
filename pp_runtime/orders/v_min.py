"""A third of 1F1B's activations with about two thirds of its bubble, on a V of two stages a rank.

Qi et al., "Pipeline Parallelism with Controllable Memory", 2024, arXiv:2405.15362: V-Min.
"""

from __future__ import annotations

from pp_runtime.orders.building_block import Steps, block_order
from pp_runtime.orders.ir import Order
from pp_runtime.orders.limits import require_stages_per_rank

_STEPS = Steps(forward_down=1, forward_up=1, backward_down=1, backward_up=1)


def v_min(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """V-Min: about ``2 * num_ranks / 3 + 3`` stage activations on a rank; 1F1B has ``2 * num_ranks`` on its first."""
    require_stages_per_rank("VMin", num_ranks, num_stages, num_microbatches, stages=2)
    return block_order(num_ranks, num_microbatches, _STEPS)
