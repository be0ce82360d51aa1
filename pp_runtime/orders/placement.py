"""Which rank holds which stage."""

from __future__ import annotations

from pp_runtime.orders.ir import Placement


def looped(num_ranks: int, num_stages: int) -> Placement:
    """Stages go round the ranks: 0 1 2 3 0 1 2 3."""
    return tuple(stage % num_ranks for stage in range(num_stages))


def v_shaped(num_ranks: int, num_stages: int) -> Placement:
    """Stages go down the ranks and up again: 0 1 2 3 3 2 1 0. ValueError unless each rank gets equally many."""
    if num_stages % num_ranks:
        raise ValueError(
            f"A V of {num_stages} stages over {num_ranks} ranks is not even; take a multiple of {num_ranks} stages."
        )
    down = range(num_ranks)
    turns = num_stages // num_ranks
    return tuple(rank for turn in range(turns) for rank in (reversed(down) if turn % 2 else down))


def stages_of_rank(placement: Placement, rank: int) -> list[int]:
    """The stages a rank holds, lowest first."""
    return [stage for stage, holder in enumerate(placement) if holder == rank]
