"""Passes: what each adds, moves or merges, and that what they make is right."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.edges import Edge, adjacent_edges, neighbours
from pp_runtime.orders.ir import Action
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.passes.data_parallel import insert_reduce_grad, insert_unshard
from pp_runtime.planning.passes.defer import defer_receives
from pp_runtime.planning.passes.merge import merge_split_backward
from pp_runtime.planning.verifier import verify, verify_communication

NAMES = [name for name, spec in ORDERS.items() if not spec.forward_only]


def row(text):
    return [Action.from_str(part) for part in text.split()]


def order_of(name, ranks=3, microbatches=7, stages_per_rank=2):
    stages = ranks * (ORDERS[name].stages_per_rank_allowed or (stages_per_rank,))[0]
    return build_order(name, ranks, stages, microbatches)


def test_sends_follow_producers_and_receives_precede_consumers():
    order, placement = build_order("1F1B", 2, 2, 2)
    assert insert_communication(order, placement) == {
        0: row("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"),
        1: row("1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"),
    }


def test_neighbours_on_one_rank_need_no_communication():
    order, placement = build_order("ZBVZeroBubble", 1, 2, 3)
    assert insert_communication(order, placement) == order


def test_overlapped_parts_receive_before_and_send_after_both():
    order = {0: row("0F0 0F1 0B0 0B1"), 1: row("1F0 (1F1;1B0)OVERLAP_F_B 1B1")}
    assert insert_communication(order, (0, 1))[1] == row(
        "1RECV_F0 1F0 1RECV_F1 (1F1;1B0)OVERLAP_F_B 1SEND_B0 1B1 1SEND_B1"
    )


def test_input_gradients_are_sent_and_weight_gradients_are_not():
    order = {0: row("0F0 0I0 0W0"), 1: row("1F0 1I0 1W0")}
    assert insert_communication(order, (0, 1))[1] == row("1RECV_F0 1F0 1I0 1SEND_B0 1W0")


def test_forward_only_sends_no_gradients():
    order, placement = build_order("ForwardOnly", 2, 4, 3)
    whole = insert_communication(order, placement, backward=False)
    assert not [a for actions in whole.values() for a in actions if a.computation_type in ("SEND_B", "RECV_B")]
    verify_communication(whole, placement, 3, forward_only=True)


def test_receives_come_in_the_order_of_the_sends():
    order = {0: row("0F0 0F1 0B0 0B1"), 1: row("1F1 1F0 1B0 1B1")}
    whole = insert_communication(order, (0, 1))
    assert whole[1] == row("1RECV_F0 1RECV_F1 1F1 1F0 1B0 1SEND_B0 1B1 1SEND_B1")
    verify_communication(whole, (0, 1), 2)


def test_skip_edges_are_received_together_with_the_chain():
    edges = (*adjacent_edges(3), Edge(0, 2))
    order = {0: row("0F0 0B0"), 1: row("1F0 1B0"), 2: row("2F0 2B0")}
    whole = insert_communication(order, (0, 1, 2), edges)
    assert whole == {
        0: row("0F0 0SEND_F0 0RECV_B0 0B0"),
        1: row("1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0"),
        2: row("2RECV_F0 2F0 2B0 2SEND_B0"),
    }
    verify_communication(whole, (0, 1, 2), 1, edges)


def test_two_senders_with_different_orders_are_refused():
    order = {0: row("0F0 0F1"), 1: row("1F1 1F0"), 2: row("2F0 2F1")}
    with pytest.raises(InvalidOrderError, match="Stages 0 and 1 both send to stage 2"):
        insert_communication(order, (0, 1, 2), (Edge(0, 2), Edge(1, 2)), backward=False)


def test_edges_go_from_lower_to_higher_stages():
    with pytest.raises(ValueError, match="from stage 2 to stage 1"):
        neighbours(3, [Edge(2, 1)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("microbatches", [1, 2, 5, 8])
def test_whole_orders_of_every_schedule_are_accepted(name, microbatches):
    order, placement = order_of(name, microbatches=microbatches)
    whole = insert_communication(insert_reduce_grad(insert_unshard(order)), placement)
    verify_communication(whole, placement, microbatches)
    verify_communication(defer_receives(whole), placement, microbatches)
    verify(merge_split_backward(order), placement, microbatches)


@pytest.mark.parametrize("name", NAMES)
def test_whole_orders_hold_what_torch_puts_into_them(name):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    order, placement = order_of(name, microbatches=8)
    whole = insert_unshard(order)
    theirs = {rank: [schedules._Action.from_str(str(a)) for a in actions] for rank, actions in order.items()}
    theirs = {rank: schedules._add_unshard_reshard(actions) for rank, actions in theirs.items()}
    assert texts(whole) == texts(theirs)
    theirs = {rank: schedules._add_reduce_grad(actions, 8) for rank, actions in theirs.items()}
    whole = insert_reduce_grad(whole)
    assert texts(whole) == texts(theirs)
    theirs = schedules._add_send_recv(theirs, placement.__getitem__, len(placement))
    for rank, actions in texts(insert_communication(whole, placement)).items():
        mine, others = [t for t in actions if "RECV" not in t], [str(a) for a in theirs[rank] if "RECV" not in str(a)]
        assert sorted(mine) == sorted(others)
        assert sorted(actions) == sorted(map(str, theirs[rank]))
    verify_communication(read(texts(theirs)), placement, 8)  # torch's receives stand early


@pytest.mark.parametrize("name", NAMES)
def test_merged_orders_are_torch_merged_orders(name):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    order, _ = order_of(name)
    for rank, actions in merge_split_backward(order).items():
        theirs = schedules._merge_bw([schedules._Action.from_str(str(a)) for a in order[rank]])
        assert list(map(str, actions)) == list(map(str, theirs))


def texts(order):
    return {rank: [str(action) for action in actions] for rank, actions in order.items()}


def read(rows):
    return {rank: [Action.from_str(text) for text in actions] for rank, actions in rows.items()}


def test_gradients_are_reduced_after_the_last_backward_of_each_stage():
    order = {0: row("0F0 1F0 1I0 0I0 1W0 0W0")}
    assert insert_reduce_grad(order)[0] == row("0F0 1F0 1I0 0I0 1W0 1REDUCE_GRAD 0W0 0REDUCE_GRAD")


@pytest.mark.parametrize("active", [1, 2, 3])
def test_no_more_stages_are_gathered_than_allowed(active):
    order, _ = build_order("Interleaved1F1B", 2, 8, 4)
    for actions in insert_unshard(order, active).values():
        gathered = set()
        for stage, kind, _, _ in actions:
            if kind == "UNSHARD":
                gathered.add(stage)
            elif kind == "RESHARD":
                gathered.remove(stage)
            else:
                assert stage in gathered
            assert len(gathered) <= active
        assert not gathered


def test_a_rank_needs_a_gathered_stage():
    with pytest.raises(ValueError, match="at least 1"):
        insert_unshard({0: []}, 0)


def test_deferred_receives_stand_before_their_consumers_in_the_order_of_the_sends():
    order = {0: row("0RECV_B0 0RECV_B1 0F0 0SEND_F0 0F1 0SEND_F1 0B1 0B0")}
    assert defer_receives(order)[0] == row("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B1 0B0")


def test_a_receive_without_a_consumer_is_refused():
    with pytest.raises(InvalidOrderError, match="Rank 0: nothing on this rank consumes what 0RECV_B0"):
        defer_receives({0: row("0RECV_B0 0F0")})


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.data())
def test_skip_edges_of_any_graph_keep_an_order_right(name, ranks, microbatches, stages_per_rank, data):
    order, placement = order_of(name, ranks, microbatches, stages_per_rank)
    stages = range(len(placement))
    possible = [Edge(a, b) for a in stages for b in stages if a + 1 < b]
    skips = data.draw(st.lists(st.sampled_from(possible), unique=True, max_size=4)) if possible else []
    edges = (*adjacent_edges(len(placement)), *skips)
    verify(order, placement, microbatches, edges)
    verify_communication(insert_communication(order, placement, edges), placement, microbatches, edges)
