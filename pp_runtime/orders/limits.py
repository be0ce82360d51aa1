"""What an order's mathematics does not allow, said as what to change."""

from __future__ import annotations


def require_counts(name: str, num_ranks: int, num_stages: int, num_microbatches: int) -> None:
    """ValueError unless there is at least one microbatch and at least one stage for every rank."""
    if num_microbatches < 1:
        raise ValueError(f"{name} got {num_microbatches} microbatches; give at least 1.")
    if num_ranks < 1:
        raise ValueError(f"{name} got {num_ranks} ranks; give at least 1.")
    if num_stages < num_ranks:
        raise ValueError(
            f"{name} got {num_stages} stages for {num_ranks} ranks, so that a rank has none; "
            f"use at most {max(num_stages, 0)} ranks or split the model into at least {num_ranks} stages."
        )


def require_stages_per_rank(name: str, num_ranks: int, num_stages: int, num_microbatches: int, stages: int) -> None:
    """ValueError unless every rank holds exactly this many stages."""
    require_counts(name, num_ranks, num_stages, num_microbatches)
    if num_stages != stages * num_ranks:
        raise ValueError(
            f"{name} needs exactly {stages} stage{'s' if stages > 1 else ''} a rank, but got {num_stages} stages for "
            f"{num_ranks} ranks; split the model into {stages * num_ranks} stages or choose another schedule."
        )


def require_equal_stages(name: str, num_ranks: int, num_stages: int, num_microbatches: int) -> int:
    """How many stages every rank holds; ValueError unless it is one number."""
    require_counts(name, num_ranks, num_stages, num_microbatches)
    if num_stages % num_ranks:
        below = num_stages - num_stages % num_ranks
        raise ValueError(
            f"{name} needs equally many stages on every rank, but got {num_stages} stages for {num_ranks} ranks; "
            f"split the model into {below} or {below + num_ranks} stages."
        )
    return num_stages // num_ranks
