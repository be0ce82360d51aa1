"""Half of 1F1B's activations with about half of its bubble, on a V of two stages a rank.

Qi et al., "Pipeline Parallelism with Controllable Memory", 2024, arXiv:2405.15362: V-Half.
"""

from __future__ import annotations

from pp_runtime.orders.building_block import Steps, block_order
from pp_runtime.orders.ir import Order
from pp_runtime.orders.limits import require_stages_per_rank
from pp_runtime.orders.placement import v_shaped
from pp_runtime.orders.weight_filling import fill_with_weights

_STEPS = Steps(forward_down=1, forward_up=2, backward_down=1, backward_up=2)


def v_half(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """V-Half: about ``num_ranks + 3`` stage activations on every rank; 1F1B has ``2 * num_ranks`` on its first."""
    require_stages_per_rank("VHalf", num_ranks, num_stages, num_microbatches, stages=2)
    return fill_with_weights(block_order(num_ranks, num_microbatches, _STEPS), v_shaped(num_ranks, num_stages))
