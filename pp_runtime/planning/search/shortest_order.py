"""The shortest order that a search finds for given costs under a cap on memory.

The idea of searching instead of choosing is that of the automatic schedules of Qi et al., "Zero Bubble Pipeline
Parallelism", 2023, arXiv:2401.10241, section 3; the search is our own: greedy policies, improved one choice at a time,
beside every named order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pp_runtime.orders import ORDERS, Order, Placement, looped, require_counts, v_shaped
from pp_runtime.planning.passes import merge_split_backward
from pp_runtime.planning.search.greedy import Policy, greedy_order
from pp_runtime.planning.search.swaps import improved_by_swaps
from pp_runtime.timing import Costs, activation_peaks, simulate

_ACTIONS_TO_TRY = 4_000_000  # bounds the time of a search over large orders: some seconds, after the named ones


def auto(
    num_ranks: int,
    num_stages: int,
    num_microbatches: int,
    costs: Costs | None = None,
    memory_cap: int | None = None,
    placement: Placement | None = None,
) -> Order:
    """The shortest order found: within the cap, and no longer than any named order within it.

    ``memory_cap`` is how many activations a rank may hold at once, one for each forward of one of its stages until
    that microbatch's B or W there; None is no cap. Without a ``placement`` both the looped and the V-shaped one are
    tried; :func:`pp_runtime.orders.placement_of` tells which one the order has. The same arguments give the same order.
    ValueError for counts without an order, and for a cap below the stages of a rank.
    """
    require_counts("Auto", num_ranks, num_stages, num_microbatches)
    costs = costs or Costs()
    placements = _placements(num_ranks, num_stages) if placement is None else [placement]
    for found in placements:
        _require_cap(found, num_stages, memory_cap)
    search = _Search(costs, num_microbatches)
    for order, found in _named_orders(num_ranks, num_stages, num_microbatches):
        if found in placements and (memory_cap is None or max(activation_peaks(order).values()) <= memory_cap):
            search.offer(order)
    for found in placements:
        search.try_policies(found, memory_cap)
    search.refine(memory_cap)
    return search.best


def _placements(num_ranks: int, num_stages: int) -> list[Placement]:
    found = [looped(num_ranks, num_stages)]
    if num_ranks > 1 and num_stages > num_ranks and num_stages % num_ranks == 0:
        found.append(v_shaped(num_ranks, num_stages))
    return found


def _require_cap(placement: Placement, num_stages: int, memory_cap: int | None) -> None:
    if len(placement) != num_stages:
        raise ValueError(f"The placement has {len(placement)} stages, not {num_stages}.")
    needed = max(placement.count(rank) for rank in set(placement))
    if memory_cap is not None and memory_cap < needed:
        raise ValueError(
            f"A cap of {memory_cap} activations a rank is too small: a rank with {needed} stages needs one for each; "
            f"give at least {needed}."
        )


def _named_orders(num_ranks: int, num_stages: int, num_microbatches: int) -> Iterator[tuple[Order, Placement]]:
    """Every named training order that allows these counts."""
    for spec in ORDERS.values():
        if spec.forward_only or spec.name == "Auto":
            continue
        try:
            order, placement = (
                spec.build(num_ranks, num_stages, num_microbatches),
                spec.placement(num_ranks, num_stages),
            )
        except ValueError:
            continue
        yield order, placement


class _Search:
    """The best order so far, and what has been tried. Counts of tries, not time, end it, so it is deterministic."""

    def __init__(self, costs: Costs, num_microbatches: int) -> None:
        self.costs = costs
        self.num_microbatches = num_microbatches
        self.best: Order = {}
        self.makespan = float("inf")
        self.peak = float("inf")
        self._actions_left = _ACTIONS_TO_TRY
        self._tried: dict[tuple[Placement, Policy], tuple[float, float]] = {}

    def offer(self, order: Order) -> tuple[float, float]:
        """Keep the order if it is shorter, or as short with fewer activations; its makespan and peak."""
        makespan = simulate(order, self.costs).makespan
        self._actions_left -= sum(map(len, order.values()))
        peak = max(activation_peaks(order).values())
        if makespan < self.makespan * (1 - 1e-9) or (makespan <= self.makespan * (1 + 1e-9) and peak < self.peak):
            self.best, self.makespan, self.peak = order, makespan, peak
        return makespan, peak

    def try_policies(self, placement: Placement, memory_cap: int | None) -> None:
        """From a few starting policies, change one choice at a time as long as that shortens the order."""
        chunks = max(placement.count(rank) for rank in set(placement))
        ranks = max(placement) + 1
        most = chunks * self.num_microbatches
        cap = most if memory_cap is None else min(memory_cap, most)
        caps = sorted({min(cap, size) for size in (chunks * ranks, 2 * chunks * ranks - chunks, cap)} | {cap})
        choices: dict[str, Iterable[object]] = {
            "cap": caps,
            "first": ("backward", "alternate", "forward"),
            "debt": (1, 2, max(2, ranks // 2), ranks, 1 << 30),
            "patience": (0.0, 0.5, 1.0),
            "freeing": (False, True),
        }
        if chunks > 1:
            choices |= {
                "reserve": sorted({1, max(1, ranks // 2), max(1, ranks - 1), ranks}),
                "forward_from_last": (True, False),
                "backward_from_last": (True, False),
            }
        for start in (
            Policy(cap),
            Policy(caps[0], first="alternate", backward_from_last=False),
            Policy(cap, split=False),
        ):
            self._descend(placement, start, choices)

    def _descend(self, placement: Placement, policy: Policy, choices: dict[str, Iterable[object]]) -> None:
        score = self._score(placement, policy)
        improved = True
        while improved:
            improved = False
            for name, values in choices.items():
                for value in values:
                    changed = replace(policy, **{name: value})  # type: ignore[arg-type]
                    found = self._score(placement, changed)
                    if found < score:
                        policy, score, improved = changed, found, True

    def _score(self, placement: Placement, policy: Policy) -> tuple[float, float]:
        key = (placement, policy)
        if key not in self._tried:
            if self._actions_left < 0:
                return float("inf"), float("inf")
            order = greedy_order(placement, self.num_microbatches, self.costs, policy)
            self._tried[key] = self.offer(order)
        return self._tried[key]

    def refine(self, memory_cap: int | None) -> None:
        """Swap neighbours on the critical path, then merge I and W that stand together where a B is not slower."""
        self.offer(improved_by_swaps(self.best, self.costs, memory_cap))
        if not self._take_if_as_short(merge_split_backward(self.best)):
            for rank in self.best:
                if self._actions_left > 0:
                    self._take_if_as_short({**self.best, **merge_split_backward({rank: self.best[rank]})})

    def _take_if_as_short(self, order: Order) -> bool:
        makespan = simulate(order, self.costs).makespan
        self._actions_left -= sum(map(len, order.values()))
        if makespan > self.makespan * (1 + 1e-9):
            return False
        self.best, self.makespan = order, makespan
        return True
