"""A plan: its messages and credits, one rank's program, and what it keeps once that is made."""

from __future__ import annotations

import pytest

from pp_runtime.orders.catalogue import build_order
from pp_runtime.orders.edges import Edge, adjacent_edges
from pp_runtime.planning.lowering import Handlers, Lowered
from pp_runtime.planning.plan import Plan, Wiring

OPERATIONS = ("F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "HAND_F", "HAND_B", "CALL")


def plan_of(name: str, ranks: int, stages: int, microbatches: int, **options: bool) -> Plan:
    order, placement = build_order(name, ranks, stages, microbatches)
    rebuild = (lambda: build_order(name, ranks, stages, microbatches)[0]) if options.pop("rebuilds", False) else None
    return Plan(order, placement, microbatches, Wiring(adjacent_edges(stages), {}), rebuild_order=rebuild, **options)


def operations(lowered: Lowered) -> list[str]:
    numbers = lowered.numbers
    return [f"{OPERATIONS[numbers[at]]}{numbers[at + 3]}" for at in range(0, len(numbers), 7)]


def test_a_rank_of_1f1b_sends_after_what_makes_and_receives_before_what_needs() -> None:
    lowered = plan_of("1F1B", 2, 2, 2).lower(0, training=True, handlers=Handlers())
    assert operations(lowered) == ["F0", "SEND_F0", "F1", "SEND_F1", "RECV_B0", "B0", "RECV_B1", "B1"]


def test_neighbours_on_one_rank_hand_over_and_send_nothing() -> None:
    lowered = plan_of("ZBVZeroBubble", 1, 2, 1).lower(0, training=True, handlers=Handlers())
    assert operations(lowered)[:3] == ["F0", "HAND_F0", "F0"]
    assert operations(lowered).count("HAND_B0") == 1
    assert not lowered.send_channels and not lowered.receive_channels


def test_an_evaluation_runs_the_forwards_of_the_same_order() -> None:
    lowered = plan_of("1F1B", 2, 2, 3).lower(1, training=False, handlers=Handlers())
    assert operations(lowered) == ["RECV_F0", "F0", "RECV_F1", "F1", "RECV_F2", "F2"]


@pytest.mark.parametrize("name, stages", [("1F1B", 4), ("Interleaved1F1B", 8), ("ZBVZeroBubble", 8), ("VHalf", 8)])
def test_credits_follow_the_depth_and_not_the_number_of_microbatches(name: str, stages: int) -> None:
    few, many = (max(plan_of(name, 4, stages, count).credits().values()) for count in (16, 64))
    assert few == many


def test_a_channel_leads_from_the_rank_of_its_source() -> None:
    channels = plan_of("GPipe", 2, 2, 1).credits()
    assert {(c.source, c.destination, c.backward, c.sender, c.receiver) for c in channels} == {
        (0, 1, False, 0, 1),
        (0, 1, True, 1, 0),
    }


def test_a_skip_edge_has_a_channel_of_its_own() -> None:
    order, placement = build_order("GPipe", 3, 3, 2)
    plan = Plan(order, placement, 2, Wiring((Edge(0, 1), Edge(0, 2), Edge(1, 2)), {}))
    lowered = plan.lower(0, training=True, handlers=Handlers())
    assert [(c.source, c.destination) for c in lowered.send_channels] == [(0, 1), (0, 2)]
    assert operations(lowered)[:3] == ["F0", "SEND_F0", "SEND_F0"]


def test_a_released_plan_keeps_no_order_and_builds_the_same_again() -> None:
    plan = plan_of("Interleaved1F1B", 2, 4, 4, rebuilds=True)
    before, program = plan.order, plan.lower(0, training=True, handlers=Handlers()).numbers
    plan.release()
    assert not any(isinstance(value, dict) and 0 in value for value in vars(plan).values())
    assert plan.order == before and plan.lower(0, training=True, handlers=Handlers()).numbers == program


def test_a_plan_whose_order_cannot_be_built_again_keeps_it() -> None:
    plan = plan_of("GPipe", 2, 2, 2)
    plan.release()
    assert plan.order == build_order("GPipe", 2, 2, 2)[0]
