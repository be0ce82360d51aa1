"""The verifier: what it refuses and how it says so, and that its verdict is that of an exhaustive simulation."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pp_runtime.errors import InvalidOrderError
from pp_runtime.ir import OVERLAP_F_B, Action
from pp_runtime.passes.communication import insert_communication
from pp_runtime.passes.edges import Edge, adjacent_edges
from pp_runtime.schedules.catalogue import build_order
from pp_runtime.verify import verify, verify_communication


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


# The exhaustive simulation: every interleaving of the ranks, each action by its meaning alone.


class Machine:
    """All ranks at their places; what is known follows from the places."""

    def __init__(self, order, placement, edges):
        self.order, self.placement, self.edges = order, placement, edges

    def after(self, places):
        """(what has been computed, posted messages by channel end) once each rank has done its first actions."""
        made, ends = set(), {}
        for rank, place in places.items():
            for action in self.order[rank][:place]:
                for stage, kind, microbatch, _ in action.sub_actions or (action,):
                    self._make(made, ends, stage, kind.value, microbatch)
        return made, ends

    def _make(self, made, ends, stage, kind, microbatch):
        if kind in "FIWB":
            made.add((kind, stage, microbatch))
            return
        for edge in self.remote_edges(stage, kind):
            ends.setdefault((edge, kind), []).append(microbatch)

    def remote_edges(self, stage, kind):
        source = kind in ("SEND_F", "RECV_B")
        return [
            edge for edge in self.edges
            if (edge.source if source else edge.destination) == stage
            and self.placement[edge.source] != self.placement[edge.destination]
        ]  # fmt: skip

    def arrived(self, ends, edge, way, microbatch):
        """Whether both ends have come to the message: without buffers the shorter end decides."""
        sent, received = ends.get((edge, f"SEND_{way}"), []), ends.get((edge, f"RECV_{way}"), [])
        return microbatch in sent[: min(len(sent), len(received))]

    def can_run(self, action, made, ends, with_messages):
        made = set(made)
        for part in action.sub_actions or (action,):
            if not self._part_can_run(part, made, ends, with_messages):
                return False
            made.add((part.computation_type.value, part.stage_index, part.microbatch_index))
        return True

    def _part_can_run(self, part, made, ends, with_messages):
        stage, kind, microbatch = part.stage_index, part.computation_type.value, part.microbatch_index
        has_backward = ("B", stage, microbatch) in made or ("I", stage, microbatch) in made
        if kind == "SEND_F":
            return ("F", stage, microbatch) in made
        if kind == "SEND_B":
            return has_backward
        if kind in ("RECV_F", "RECV_B"):
            return True
        if (kind, stage, microbatch) in made:
            return False
        if kind == "W":
            return ("I", stage, microbatch) in made
        if kind != "F" and (("F", stage, microbatch) not in made or has_backward):
            return False
        for edge in self.edges:
            here, there = (edge.destination, edge.source) if kind == "F" else (edge.source, edge.destination)
            if here != stage:
                continue
            if with_messages and self.placement[here] != self.placement[there]:
                if not self.arrived(ends, edge, "F" if kind == "F" else "B", microbatch):
                    return False
            elif not any((k, there, microbatch) in made for k in ("F" if kind == "F" else "BI")):
                return False
        return True


def simulate_exhaustively(order, placement, microbatches, edges, with_messages):
    """Whether every interleaving comes to the end with everything done once."""
    wanted = []
    for stage in range(len(placement)):
        for microbatch in range(microbatches):
            wanted.append((stage, "F", microbatch))
            wanted += [(stage, "IW"[half], microbatch) for half in (0, 1)]
    found = []
    for rank, actions in order.items():
        for action in actions:
            for stage, kind, microbatch, _ in action.sub_actions or (action,):
                if stage >= len(placement) or placement[stage] != rank:
                    return False
                found += [(stage, k, microbatch) for k in ("IW" if kind == "B" else (kind.value,))]
    machine = Machine(order, placement, edges)
    if with_messages:
        for stage in range(len(placement)):
            for kind in ("SEND_F", "RECV_F", "SEND_B", "RECV_B"):
                if machine.remote_edges(stage, kind):
                    wanted += [(stage, kind, microbatch) for microbatch in range(microbatches)]
    if sorted(wanted) != sorted(found):
        return False
    end = {rank: len(actions) for rank, actions in order.items()}
    if with_messages:
        ends = machine.after(end)[1]
        if any(ends[edge, kind] != ends[edge, kind.replace("SEND", "RECV")] for edge, kind in ends if "SEND" in kind):
            return False
    todo, seen = [dict.fromkeys(order, 0)], set()
    while todo:
        places = todo.pop()
        if tuple(places.values()) in seen:
            continue
        seen.add(tuple(places.values()))
        made, ends = machine.after(places)
        steps = [
            {**places, rank: place + 1} for rank, place in places.items()
            if place < end[rank] and machine.can_run(order[rank][place], made, ends, with_messages)
        ]  # fmt: skip
        if not steps and places != end:
            return False
        todo += steps
    return True


@st.composite
def settings_and_orders(draw):
    """A small random setting with an order that is valid by construction: a random run of a global machine."""
    ranks = draw(st.integers(1, 3))
    placement = tuple(draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=4)))
    microbatches = draw(st.integers(1, 2))
    stages = range(len(placement))
    skips = [Edge(a, b) for a in stages for b in stages if a + 1 < b and draw(st.booleans())]
    edges = (*adjacent_edges(len(placement)), *skips)
    todo = []
    for stage in stages:
        for microbatch in range(microbatches):
            kinds = ("F", "I", "W") if draw(st.booleans()) else ("F", "B")
            todo += [Action.from_str(f"{stage}{kind}{microbatch}") for kind in kinds]
    order = {rank: [] for rank in range(ranks)}
    machine, made = Machine(order, placement, edges), set()
    while todo:
        possible = [action for action in todo if machine.can_run(action, made, {}, False)]
        action = draw(st.sampled_from(possible))
        todo.remove(action)
        made.add((action.computation_type.value, action.stage_index, action.microbatch_index))
        order[placement[action.stage_index]].append(action)
    return order, placement, microbatches, edges


def broken(draw, order):
    """The order with one thing changed; it may still be right."""
    order = {rank: list(actions) for rank, actions in order.items()}
    rank = draw(st.sampled_from([rank for rank, actions in order.items() if actions]))
    actions = order[rank]
    at, to = (draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    change = draw(st.sampled_from(["move", "swap", "drop", "double", "microbatch", "rank", "overlap"]))
    if change == "move":
        actions.insert(to, actions.pop(at))
    elif change == "swap":
        actions[at], actions[to] = actions[to], actions[at]
    elif change == "drop":
        del actions[at]
    elif change == "double":
        actions.insert(to, actions[at])
    elif change == "microbatch" and actions[at].sub_actions is None:
        actions[at] = actions[at]._replace(microbatch_index=draw(st.integers(0, 2)))
    elif change == "rank":
        order[draw(st.sampled_from(sorted(order)))].append(actions.pop(at))
    elif change == "overlap":
        both = tuple(actions[at : at + 2])
        if len(both) == 2 and all(action.is_compute_op and action.sub_actions is None for action in both):
            actions[at : at + 2] = [Action(-1, OVERLAP_F_B, None, both)]
    return order


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
