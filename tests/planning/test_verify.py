"""The verifier: what it refuses and how it says so, and that its verdict is that of an exhaustive simulation."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders.catalogue import build_order
from pp_runtime.orders.edges import Edge, adjacent_edges
from pp_runtime.orders.ir import Action
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.verifier import verify, verify_communication
from tests.helpers.exhaustive import simulate_exhaustively
from tests.helpers.random_orders import broken, settings_and_orders


def order_of(*rows):
    return {rank: [Action.from_str(text) for text in row.split()] for rank, row in enumerate(rows)}


LAST = "1F0 1B0 1F1 1B1"


@pytest.mark.parametrize(
    ("first", "last", "complaint"),
    [
        (
            "0F0 0F1 0B0",
            LAST,
            r"Rank 0, end of its actions: the order has no B \(nor I and W\) of microbatch 1 on stage 0",
        ),
        ("0F0 0F1 0B0 0I1", LAST, r"Rank 0, end .* no W of microbatch 1 on stage 0"),
        ("0F0 0B0", LAST, "no F of microbatch 1 on stage 0"),
        ("0F0 0F1 0F0 0B0 0B1", LAST, r"Rank 0, action 2, 0F0: the forward of microbatch 0 on stage 0 has run already"),
        ("0F0 0F1 0B0 0B0 0B1", LAST, r"Rank 0, action 3, 0B0: .* its backward has run already"),
        ("0F0 0F1 0W0 0I0 0B1", LAST, r"Rank 0, action 2, 0W0: 0I0 has not run on this rank before it"),
        ("0F0 0F1 0I0 0B0 0B1", LAST, r"Rank 0, action 3, 0B0: .* only its F and I have run"),
        ("0B0 0F0 0F1 0B1", LAST, r"Rank 0, action 0, 0B0: 0F0 has not run on this rank before it"),
        ("0F0 0F2 0B0 0B2", LAST, r"Rank 0, action 1, 0F2: microbatch 2 is not one of 0 to 1"),
        ("0F0 1F0 0B0", LAST, r"Rank 0, action 1, 1F0: stage 1 is on rank 1; a stage has one rank"),
        ("0F0 7F0 0B0", LAST, r"Rank 0, action 1, 7F0: there is no stage 7"),
        ("0F0 0SEND_F0", LAST, r"Rank 0, action 1, 0SEND_F0: an order of compute actions has no communication"),
        ("0F0 0F1 0B0 0REDUCE_GRAD 0B1", LAST, r"0REDUCE_GRAD: the backward of microbatch 1 on stage 0 has not run"),
        ("0F0 0F1 0B0 0B1 0REDUCE_GRAD 0REDUCE_GRAD", LAST, r"gradients of stage 0 have been reduced already"),
        (
            "0F0 0B0 0F1 0B1",
            "1F1 1B1 1F0 1B0",
            r"(?s)deadlocks.*0B0: it waits for 1B0, of rank 1.*1F1: it waits for 0F1",
        ),
    ],
)
def test_a_wrong_order_is_refused_with_rank_and_action(first, last, complaint):
    with pytest.raises(InvalidOrderError, match=complaint):
        verify(order_of(first, last), (0, 1), 2)


def test_the_place_is_marked_in_the_text_of_the_order():
    with pytest.raises(InvalidOrderError) as refusal:
        verify(order_of("0F0 0F1 0F2 0F3 0B0 0B1 0B1 0B2 0B3"), (0,), 4)
    text, carets = str(refusal.value).splitlines()[1:]
    assert text == "rank 0: ... 0F2 0F3 0B0 0B1 0B1 0B2 0B3"
    assert [at for at, mark in enumerate(carets) if mark == "^"] == [i + text.rindex("0B1") for i in range(3)]


def test_a_forward_only_order_has_every_forward_and_no_backward():
    verify(order_of("0F0 0F1", "1F0 1F1"), (0, 1), 2, forward_only=True)
    for rows in (("0F0", "1F0 1F1"), ("0F0 0F1 0B0", "1F0 1F1")):
        with pytest.raises(InvalidOrderError):
            verify(order_of(*rows), (0, 1), 2, forward_only=True)


def test_a_rank_without_actions_is_refused_by_number():
    with pytest.raises(InvalidOrderError, match="Stage 1 is on rank 1"):
        verify(order_of("0F0 0B0"), (0, 1), 1)


def test_an_order_that_only_a_skip_edge_forbids_is_refused():
    order = order_of("0F0 0B0", "1F0 1B0", "2F0 2B0")
    verify(order, (0, 1, 2), 1, adjacent_edges(3))
    order[0].reverse()
    with pytest.raises(InvalidOrderError):
        verify(order, (0, 1, 2), 1, adjacent_edges(3))
    shared = order_of("2F0 0F0 0B0 2B0", "1F0 1B0")
    verify(shared, (0, 1, 0), 1, (Edge(0, 1),))
    with pytest.raises(InvalidOrderError, match="2F0: it waits for 0F0, which stands later on this rank"):
        verify(shared, (0, 1, 0), 1, (Edge(0, 1), Edge(0, 2)))


RIGHT = "1RECV_F0 1F0 1B0 1SEND_B0"


@pytest.mark.parametrize(
    ("first", "last", "complaint"),
    [
        ("0F0 0SEND_F0 0B0", RIGHT, "Rank 0, action 2, 0B0: 0RECV_B0 does not stand before it"),
        ("0F0 0RECV_B0 0B0", RIGHT, "Rank 0, end of its actions: the order has no 0SEND_F0"),
        ("0SEND_F0 0F0 0RECV_B0 0B0", RIGHT, "Rank 0, action 0, 0SEND_F0: .* not made before it"),
        ("0F0 0SEND_F0 0SEND_F0 0RECV_B0 0B0", RIGHT, "Rank 0, action 2, 0SEND_F0: it has stood before"),
        ("0F0 0SEND_F0 0RECV_B0 0B0 0SEND_B0", RIGHT, "Rank 0, action 4, 0SEND_B0: stage 0 has no such message"),
        ("0F0 0SEND_F1 0RECV_B0 0B0", RIGHT, "Rank 0, action 1, 0SEND_F1: microbatch 1 is not one of 0 to 0"),
        ("0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0", "Rank 1, end of its actions: the order has no 1SEND_B0"),
    ],
)  # fmt: skip
def test_wrong_communication_is_refused_with_rank_and_action(first, last, complaint):
    with pytest.raises(InvalidOrderError, match=complaint):
        verify_communication(order_of(first, last), (0, 1), 1)


def test_the_two_ends_of_a_channel_have_one_sequence():
    order = order_of("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F1 1RECV_F0 1F0 1F1")
    with pytest.raises(
        InvalidOrderError, match=r"(?s)Rank 1, action 0, 1RECV_F1: rank 0 sends 0SEND_F0.*Rank 0, action 1"
    ):
        verify_communication(order, (0, 1), 2, forward_only=True)


def test_a_send_that_comes_too_late_for_its_receiver_is_a_deadlock():
    order = order_of(
        "0F0 0F1 0SEND_F0 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1", "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"
    )
    verify_communication(order, (0, 1), 2)
    late = order_of(
        "0F0 0SEND_F0 0F1 0RECV_B0 0B0 0SEND_F1 0RECV_B1 0B1", "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1"
    )
    with pytest.raises(
        InvalidOrderError, match=r"(?s)deadlocks.*0B0: it waits for 1SEND_B0.*1F1: it waits for 0SEND_F1"
    ):
        verify_communication(late, (0, 1), 2)


def test_a_large_order_is_proved_in_seconds():
    order, placement = build_order("Interleaved1F1B", 64, 256, 256)
    begin = time.perf_counter()
    verify(order, placement, 256)
    whole = insert_communication(order, placement)
    verify_communication(whole, placement, 256)
    assert time.perf_counter() - begin < 20  # 0.5 million actions; about 0.7 s on an idle core


def accepts(check, *arguments):
    try:
        check(*arguments)
    except InvalidOrderError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(settings_and_orders(), st.integers(0, 3), st.data())
def test_the_verdict_is_that_of_an_exhaustive_simulation(setting, changes, data):
    order, placement, microbatches, edges = setting
    for _ in range(changes):
        order = broken(data.draw, order) if any(order.values()) else order
    expected = simulate_exhaustively(order, placement, microbatches, edges, False)
    assert accepts(verify, order, placement, microbatches, edges) == expected
    assert expected or changes


@settings(max_examples=150, deadline=None)
@given(settings_and_orders(), st.integers(0, 3), st.data())
def test_the_verdict_on_messages_is_that_of_an_exhaustive_simulation(setting, changes, data):
    order, placement, microbatches, edges = setting
    try:
        order = insert_communication(order, placement, edges)
    except InvalidOrderError:
        return  # two senders in different orders: nothing to compare
    for _ in range(changes):
        order = broken(data.draw, order) if any(order.values()) else order
    expected = simulate_exhaustively(order, placement, microbatches, edges, True)
    assert accepts(verify_communication, order, placement, microbatches, edges) == expected
    assert expected or changes
