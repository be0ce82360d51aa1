"""The search for the shortest order: right, within its cap, at least as good as every named order, repeatable."""

from __future__ import annotations

import time

import pytest

from pp_runtime.orders.catalogue import ORDERS
from pp_runtime.orders.ir import placement_of
from pp_runtime.orders.placement import looped, v_shaped
from pp_runtime.planning.search.greedy import Policy, greedy_order
from pp_runtime.planning.search.shortest_order import auto
from pp_runtime.planning.verifier import verify
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.peaks import activation_peaks
from pp_runtime.timing.simulation import simulate

EVEN = Costs()
UNEVEN = Costs(
    forward=(1.0, 1.3, 0.9, 2.0) * 2,
    backward_input=(1.2, 1.1, 0.8, 2.5) * 2,
    backward_weight=(0.7, 0.9, 1.0, 0.5) * 2,
    full_backward=(1.6, 1.9, 1.7, 2.8) * 2,
    transfer=0.2,
)


@pytest.mark.parametrize("costs", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("ranks", "stages", "microbatches", "cap"),
    [
        (1, 1, 3, None),
        (2, 2, 1, None),
        (4, 4, 8, None),
        (4, 4, 8, 4),
        (4, 4, 8, 1),
        (3, 5, 4, 2),
        (4, 8, 6, 5),
        (4, 8, 6, 2),
    ],
)
def test_order_is_right_within_the_cap_and_no_longer_than_any_named_one(
    ranks: int, stages: int, microbatches: int, cap: int | None, costs: Costs
) -> None:
    order = auto(ranks, stages, microbatches, costs, cap)
    verify(order, placement_of(order), microbatches)
    assert cap is None or max(activation_peaks(order).values()) <= cap
    found = simulate(order, costs).makespan
    for name, spec in ORDERS.items():
        try:
            named = spec.build(ranks, stages, microbatches)
        except ValueError:
            continue
        if not spec.forward_only and (cap is None or max(activation_peaks(named).values()) <= cap):
            assert found <= simulate(named, costs).makespan * (1 + 1e-9), name


def test_search_beats_every_named_order_where_messages_take_time_and_memory_is_short() -> None:
    costs = Costs(transfer=0.3)
    order = auto(4, 8, 16, costs, memory_cap=6)
    named = [
        simulate(spec.build(4, 8, 16), costs).makespan
        for spec in ORDERS.values()
        if spec.stages_per_rank_allowed != (1,)
        and not spec.forward_only
        and max(activation_peaks(spec.build(4, 8, 16)).values()) <= 6
    ]
    assert named
    assert simulate(order, costs).makespan < min(named)


def test_same_arguments_give_the_same_order() -> None:
    assert auto(4, 8, 8, UNEVEN, 7) == auto(4, 8, 8, UNEVEN, 7)


def test_full_backward_is_chosen_where_halves_cost_more() -> None:
    order = auto(2, 2, 8, Costs(backward_input=2.0, backward_weight=2.0, full_backward=2.0))
    kinds = {str(action.computation_type.value) for actions in order.values() for action in actions}
    assert kinds == {"F", "B"}


def test_a_given_placement_is_kept() -> None:
    for placement in (looped(2, 4), v_shaped(2, 4), (0, 1, 1, 0, 0)):
        order = auto(2, len(placement), 4, placement=placement)
        assert placement_of(order) == placement
        verify(order, placement, 4)


def test_a_cap_below_a_ranks_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least 2"):
        auto(4, 8, 4, memory_cap=1)
    with pytest.raises(ValueError, match="at least 1"):
        auto(4, 4, 0)


@pytest.mark.parametrize("placement", [(0, 1, 2), (0, 1, 2, 0, 1, 2), (0, 1, 1, 0), (0, 0, 1, 0, 1, 1)])
@pytest.mark.parametrize("first", ["backward", "alternate", "forward"])
@pytest.mark.parametrize("debt", [1, 2, 1 << 30])
def test_every_policy_ends_within_the_smallest_cap(placement: tuple[int, ...], first: str, debt: int) -> None:
    cap = max(placement.count(rank) for rank in placement)
    for policy in (
        Policy(cap, first=first, debt=debt),
        Policy(cap, first=first, debt=debt, forward_from_last=False, backward_from_last=False, patience=1.0),
        Policy(cap + 1, first=first, debt=debt, reserve=2, freeing=True),
        Policy(cap, first=first, split=False),
    ):
        order = greedy_order(placement, 5, Costs(transfer=0.4), policy)
        verify(order, placement, 5)
        assert max(activation_peaks(order).values()) <= policy.cap


def test_eight_ranks_two_stages_32_microbatches_take_seconds() -> None:
    begun = time.perf_counter()
    auto(8, 16, 32, Costs(transfer=0.2), 16)
    assert time.perf_counter() - begun < 20
