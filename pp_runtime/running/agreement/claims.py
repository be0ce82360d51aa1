"""What each rank holds and means to run, and what it says where the ranks do not make one pipeline."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import Order

# Of very long rows only this many actions are read at either end.
_END = 200

# Every rank's word on a topic, in rank order.
Exchange = Callable[[str, Mapping[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Claim:
    """What one rank says of itself. Every field but ``stages`` and ``schedule`` must be the same on all ranks."""

    stages: tuple[int, ...]
    num_stages: int
    num_microbatches: int
    placement: tuple[int, ...]
    has_backward: bool
    order: str
    schedule: str = ""


def check_claims(claims: list[Claim]) -> None:
    """Raise, alike on every rank, where the claims do not make one pipeline."""
    first = claims[0]
    holders: dict[int, int] = {}
    for rank, claim in enumerate(claims):
        _check_same(rank, "num_stages", claim.num_stages, first.num_stages)
        _check_same(rank, "n_microbatches", claim.num_microbatches, first.num_microbatches)
    for rank, claim in enumerate(claims):
        if claim.schedule != first.schedule and (claim.order, claim.placement) != (first.order, first.placement):
            raise PipelineUsageError(
                f"rank 0 runs {first.schedule} and rank {rank} runs {claim.schedule}: "
                "make the same schedule on every rank"
            )
        for stage in claim.stages:
            other = holders.setdefault(stage, rank)
            if other != rank:
                raise PipelineUsageError(
                    f"stage {stage} is claimed by rank {other} and by rank {rank}: give each stage index to one rank"
                )
    missing = sorted(set(range(first.num_stages)) - set(holders))
    if missing:
        raise PipelineUsageError(
            f"no rank holds stage {missing[0]}: each of the {first.num_stages} stages needs a rank"
        )
    for rank, claim in enumerate(claims):
        for stage in claim.stages:
            if claim.placement[stage] != rank:
                raise PipelineUsageError(
                    f"rank {rank} holds stage {stage}, which the schedule runs on rank {claim.placement[stage]}: "
                    f"make stage {stage} on rank {claim.placement[stage]}"
                )
        _check_same(rank, "having a loss_fn", claim.has_backward, first.has_backward)


def _check_same(rank: int, what: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise PipelineUsageError(
            f"{what} is {value} on rank {rank} and {expected} on rank 0: make it the same on every rank"
        )


def fingerprint(order: Order) -> str:
    """The same for the same order, on every rank."""
    digest = 0
    for rank in sorted(order):
        digest = zlib.crc32(_text(rank, order).encode(), digest)
    return f"{digest:08x}"


def check_orders(claims: Sequence[Claim], order: Order, exchange: Exchange) -> None:
    """Raise, alike on every rank, where two claims have different orders; say which action differs first."""
    other = next((rank for rank, claim in enumerate(claims) if claim.order != claims[0].order), None)
    if other is None:
        return
    digests = exchange("rows", {str(rank): zlib.crc32(_text(rank, order).encode()) for rank in sorted(order)})
    row = next(rank for rank in range(len(claims)) if digests[0].get(str(rank)) != digests[other].get(str(rank)))
    words = exchange("row", {"text": _text(row, order)})
    (_, length, *ours), (_, other_length, *theirs) = (words[rank]["text"].split() for rank in (0, other))
    place, one, another = next(
        (place, one, another)
        for place, (one, another) in enumerate(zip_longest(ours, theirs, fillvalue="nothing"))
        if one != another
    )
    where = f"action {place}" if place < _END else "an action near the end"
    lengths = "" if length == other_length else f" ({length} actions and {other_length})"
    raise PipelineUsageError(
        f"ranks 0 and {other} run {claims[0].schedule} in different orders{lengths}: {where} of rank {row} is {one} in "
        f"the one and {another} in the other: give every rank the same order"
    )


def _text(rank: int, order: Order) -> str:
    actions = order.get(rank, [])
    ends = actions if len(actions) <= 2 * _END else [*actions[:_END], *actions[-_END:]]
    return f"{rank} {len(actions)} " + " ".join(str(action).replace(" ", "") for action in ends)
