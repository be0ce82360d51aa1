"""The simulator against the closed forms of the papers, and against hand-drawn timelines."""

from __future__ import annotations

import time

import pytest

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.edges import Edge, adjacent_edges
from pp_runtime.orders.ir import Action
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.passes.data_parallel import insert_reduce_grad
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.peaks import activation_peaks
from pp_runtime.timing.simulation import Simulation, simulate


def played(name: str, ranks: int, stages: int, microbatches: int, **costs: object) -> Simulation:
    order, placement = build_order(name, ranks, stages, microbatches)
    return simulate(order, Costs(**costs), placement=placement)  # type: ignore[arg-type]


def order_of(*ranks: str) -> dict[int, list[Action]]:
    return {
        rank: [action for text in texts.split() if (action := Action.from_str(text))]
        for rank, texts in enumerate(ranks)
    }


@pytest.mark.parametrize("name", ["1F1B", "GPipe"])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 1), (4, 4), (4, 8), (8, 32), (5, 7)])
def test_bubble_of_1f1b_and_gpipe_is_the_textbook_one(name: str, p: int, m: int) -> None:
    result = played(name, p, p, m)
    assert result.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert result.makespan == pytest.approx(3 * (m + p - 1))


def test_1f1b_keeps_as_many_activations_as_ranks_come_after() -> None:
    assert played("1F1B", 4, 4, 16).activations == {0: 4, 1: 3, 2: 2, 3: 1}
    assert set(played("GPipe", 4, 4, 16).activations.values()) == {16}


@pytest.mark.parametrize(("p", "m"), [(4, 8), (4, 32), (8, 32)])
def test_zb1p_has_a_third_of_the_idle_time_of_1f1b_and_its_memory(p: int, m: int) -> None:
    plain, split = played("1F1B", p, p, m), played("ZB1P", p, p, m)
    assert split.idle(0) == pytest.approx(plain.idle(0) / 3)
    assert max(split.activations.values()) == max(plain.activations.values())


@pytest.mark.parametrize(("name", "stages"), [("ZB2P", 8), ("ZBVZeroBubble", 16)])
def test_zb2p_and_zbv_have_no_bubble_between_a_ranks_own_actions(name: str, stages: int) -> None:
    assert played(name, 8, stages, 32).repeated_bubble == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("name", "share"), [("VHalf", 1 / 2), ("VMin", 1 / 3)])
def test_v_half_and_v_min_keep_a_half_and_a_third_of_the_activations(name: str, share: float) -> None:
    p = 48
    peak = max(played(name, p, 2 * p, 3 * p).activations.values()) / 2  # a stage here is half of one of 1F1B's
    assert peak / p == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("name", [name for name, spec in ORDERS.items() if spec.stages_per_rank_allowed != (1,)])
@pytest.mark.parametrize("transfer", [0.0, 0.25])
def test_every_order_takes_as_long_with_its_communication_written_out(name: str, transfer: float) -> None:
    order, placement = build_order(name, 4, 8, 8)
    backward = not ORDERS[name].forward_only
    costs = Costs(transfer=transfer)
    written = simulate(insert_communication(order, placement, backward=backward), costs, placement=placement)
    silent = simulate(order, costs, placement=placement)
    assert written.makespan == pytest.approx(silent.makespan)
    assert written.slots == silent.slots
    assert written.activations == silent.activations


def test_times_can_differ_by_stage() -> None:
    result = simulate(order_of("0F0 0F1", "1F0 1F1"), Costs(forward=(1.0, 3.0), transfer=0.5))
    assert list(result.starts[1]) == [1.5, 4.5]
    assert result.makespan == 7.5
    assert (result.busy(1), result.idle(1)) == (6.0, 1.5)


def test_a_channel_carries_one_message_at_a_time() -> None:
    result = simulate(order_of("0F0 0F1", "1F0 1F1"), Costs(transfer=5.0))
    assert list(result.starts[1]) == [6.0, 11.0]


def test_an_overlap_starts_when_all_its_parts_can_and_costs_its_share() -> None:
    order = order_of("0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1")
    result = simulate(order, Costs(overlap=0.5))
    assert (result.starts[1][1], result.ends[1][1]) == (2.0, 3.5)
    assert result.busy(1) == 1.0 + 1.5 + 2.0
    assert result.makespan == 7.5


def test_an_overlap_may_use_what_its_own_parts_make_on_the_rank() -> None:
    assert simulate(order_of("0F0 (1F0;1B0)OVERLAP_F_B 0B0")).makespan == 6.0
    assert simulate(order_of("(0F0;1F0)OVERLAP_F_B 1B0 0B0")).makespan == 6.0


def test_data_parallel_actions_take_the_rank_their_time() -> None:
    order = order_of("0UNSHARD 0F0 0B0 0RESHARD 0REDUCE_GRAD")
    result = simulate(order, Costs(unshard=0.5, reshard=0.25, reduce_grad=2.0))
    assert result.makespan == 5.75
    assert (result.busy(0), result.idle(0)) == (3.0, 0.0)
    reduced, _ = build_order("1F1B", 2, 2, 4)
    assert simulate(insert_reduce_grad(reduced), Costs(reduce_grad=3.0)).makespan == simulate(reduced).makespan + 3.0


def test_skip_edges_are_waited_for() -> None:
    order = order_of("0F0", "1F0", "2F0")
    late = simulate(order, Costs(transfer=(9.0, 0.0, 0.0)), edges=[Edge(0, 2), Edge(1, 2), Edge(0, 1)])
    assert late.starts[2][0] == 11.0
    assert simulate(order, edges=[Edge(1, 2)]).starts[1][0] == 0.0


def test_a_plan_is_played_with_its_own_placement_edges_and_messages() -> None:
    from pp_runtime.planning.plan import Plan, Wiring

    order, placement = build_order("1F1B", 4, 4, 8)
    wiring = Wiring((*adjacent_edges(4), Edge(0, 3)), {})
    result = simulate(Plan(order, placement, 8, wiring), Costs(transfer=(5.0, 0.0, 0.0, 0.0)))
    assert result.makespan > simulate(order).makespan
    assert result.network.explicit and max(result.slots.values()) > 0


def test_slots_count_messages_until_their_last_use() -> None:
    result = simulate(order_of("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"))
    assert result.slots == {0: 1, 1: 2}
    assert simulate(order_of("0F0 0F1 0F2", "1F0 1F1 1F2"), Costs(forward=(1.0, 4.0))).slots == {0: 0, 1: 3}


def test_split_activations_may_be_partly_freed_by_the_input_half() -> None:
    order = order_of("0F0 0I0 0F1 0I1 0W0 0W1")
    assert activation_peaks(order) == {0: 2.0}
    assert activation_peaks(order, kept_for_weight=0.25) == {0: 1.25}


def test_an_order_that_never_ends_names_who_waits_for_what() -> None:
    with pytest.raises(InvalidOrderError, match=r"rank 0 waits in 0B0 for 1B0; rank 1 waits in 1F0 for 0F0"):
        simulate(order_of("0B0 0F0", "1F0 1B0"))


def test_costs_are_read_as_they_are_written() -> None:
    costs = Costs(forward=2.0, backward_weight=(1.0, 2.0), transfer=0.125, reduce_grad=4.0)
    assert Costs.from_text(costs.to_text()) == costs
    assert Costs.from_mapping({"F": 2, "W": [1, 2], "transfer": 0.125, "REDUCE_GRAD": 4.0}) == costs
    for wrong in ("F=x", "G=1", "F=-1", "F=nan", "F"):
        with pytest.raises(ValueError, match="cost"):
            Costs.from_text(wrong)
    with pytest.raises(ValueError, match="2 numbers for 4 stages"):
        played("1F1B", 4, 4, 4, forward=(1.0, 2.0))


def test_costs_follow_the_model_when_it_is_cut_otherwise() -> None:
    costs = Costs(forward=(1.0, 2.0, 3.0, 4.0), transfer=(0.1, 0.2, 0.3, 0.4))
    assert costs.recut(4, 2).forward == (3.0, 7.0)
    assert costs.recut(4, 2).transfer == (0.2, 0.4)
    assert costs.recut(4, 8).forward == (0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0)
    assert costs.recut(4, 8).transfer == (0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4)
    with pytest.raises(ValueError, match="neither divides"):
        costs.recut(4, 3)


def test_time_to_simulate_grows_in_proportion_to_the_actions() -> None:
    times = []
    for microbatches in (64, 512):
        order, placement = build_order("Interleaved1F1B", 16, 64, microbatches)
        begun = time.perf_counter()
        simulate(order, placement=placement)
        times.append(time.perf_counter() - begun)
    assert times[1] < 8 * times[0] * 4 + 0.5  # eight times the actions; four and a half second for a busy machine
