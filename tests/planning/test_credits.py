"""Room for messages: never less than is alive at once, and enough that no rank waits for ever."""

from hypothesis import given, settings
from pytest import mark, raises

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.edges import Edge
from pp_runtime.orders.ir import Action
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.passes.credits import _Run, channel_limits, peak_messages
from tests.helpers.random_orders import settings_and_orders


def order_of(*rows):
    return {rank: [Action.from_str(text) for text in row.split()] for rank, row in enumerate(rows)}


def ends_with(room, order, placement, edges, ahead=None):
    """Whether all ranks come to the end when a sender without room, or too far ahead, waits, as the runtime does it."""
    place = dict.fromkeys(order, 0)
    sent, received, freed = ({} for _ in range(3))

    def channels(stage, way, sending):
        return [
            (edge, way == "B")
            for edge in edges
            if placement[edge.source] != placement[edge.destination]
            and stage == (edge.source if sending == (way == "F") else edge.destination)
        ]

    def step(stage, kind, microbatch, trained):
        if kind.startswith("SEND"):
            mine = channels(stage, kind[-1], True)
            if any(sent.get(c, 0) - freed.get(c, 0) >= room[c] for c in mine):
                return False
            if ahead and any(sent.get(c, 0) - received.get(c, 0) >= ahead[c] for c in mine):
                return False
            count(sent, mine)
        elif kind.startswith("RECV"):
            mine = channels(stage, kind[-1], False)
            if any(sent.get(c, 0) <= received.get(c, 0) for c in mine):
                return False
            count(received, mine)
        if kind in ("B", "W") or (kind == "F" and not trained):
            count(freed, channels(stage, "F", False))
        if kind in ("B", "I"):
            count(freed, channels(stage, "B", False))
        return True

    def count(table, keys):
        for key in keys:
            table[key] = table.get(key, 0) + 1

    trained = any(action.computation_type in ("B", "W") for actions in order.values() for action in actions)
    moving = True
    while moving:
        moving = False
        for rank, actions in order.items():
            while place[rank] < len(actions):
                stage, kind, microbatch, _ = actions[place[rank]]
                if not step(stage, kind.value, microbatch, trained):
                    break
                place[rank] += 1
                moving = True
    return all(place[rank] == len(actions) for rank, actions in order.items())


@settings(max_examples=150, deadline=None)
@given(settings_and_orders())
def test_no_rank_waits_for_ever_with_the_room_given(setting):
    order, placement, _, edges = setting
    try:
        order = insert_communication(order, placement, edges)
    except InvalidOrderError:
        return  # two senders in different orders
    limits = channel_limits(order, placement, edges)
    room, ahead = ({channel: getattr(limit, name) for channel, limit in limits.items()} for name in ("room", "ahead"))
    assert ends_with(room, order, placement, edges, ahead)
    assert peak_messages(order, placement, edges) == room


CROSSED = order_of(
    "0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2B0 2SEND_B0 0RECV_B0 0B0 2RECV_F1 2F1 2B1 2SEND_B1 0RECV_B1 0B1",
    "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0 1RECV_F1 1F1 1SEND_F1 1RECV_B1 1B1 1SEND_B1",
)


def test_ranks_that_would_wait_for_each_other_get_more_room_than_is_alive_at_once():
    edges = (Edge(0, 1), Edge(1, 2))
    room = peak_messages(CROSSED, (0, 1, 0), edges)
    assert room == {(Edge(0, 1), False): 2, (Edge(1, 2), False): 1, (Edge(0, 1), True): 1, (Edge(1, 2), True): 1}
    assert ends_with(room, CROSSED, (0, 1, 0), edges)
    assert not ends_with(dict.fromkeys(room, 1), CROSSED, (0, 1, 0), edges)


def test_activations_live_to_the_backward_and_gradients_until_used():
    order, placement = build_order("1F1B", 4, 4, 16)
    room = peak_messages(insert_communication(order, placement), placement)
    assert [room[Edge(stage, stage + 1), False] for stage in range(3)] == [3, 2, 1]
    assert {room[Edge(stage, stage + 1), True] for stage in range(3)} == {1}
    split = order_of("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1F0 1I0 1RECV_F1 1F1 1I1 1W0 1W1")
    assert peak_messages(split, (0, 1))[Edge(0, 1), False] == 2


def test_activations_that_are_not_trained_on_live_until_used():
    order, placement = build_order("ForwardOnly", 3, 6, 20)
    room = peak_messages(insert_communication(order, placement, backward=False), placement)
    assert set(room.values()) == {1}


@mark.parametrize("name", [name for name in ORDERS if name not in ("GPipe", "LoopedBFS")])
def test_room_does_not_grow_with_the_number_of_microbatches(name):
    rooms = []
    for microbatches in (20, 60):
        stages = 4 * (ORDERS[name].stages_per_rank_allowed or (2,))[0]
        order, placement = build_order(name, 4, stages, microbatches)
        order = insert_communication(order, placement, backward=not ORDERS[name].forward_only)
        rooms.append(peak_messages(order, placement))
    assert rooms[0] == rooms[1]


def test_an_order_that_never_ends_has_no_room():
    with raises(InvalidOrderError, match="Rank 0 waits for ever for a gradient of stage 0"):
        peak_messages(order_of("0RECV_B0 0F0 0SEND_F0", "1RECV_F0 1F0 1B0 1SEND_B0"), (0, 1))


def ahead_of(name, ranks, stages, microbatches):
    order, placement = build_order(name, ranks, stages, microbatches)
    limits = channel_limits(insert_communication(order, placement), placement)
    return [limit.ahead for limit in limits.values()]


@mark.parametrize(("name", "stages"), [("GPipe", 4), ("1F1B", 4), ("Interleaved1F1B", 8), ("ZBVZeroBubble", 8)])
def test_a_sender_need_not_be_ahead_of_a_receiver_that_takes_as_it_comes(name, stages):
    assert set(ahead_of(name, 4, stages, 40)) == {1}


def test_a_sender_must_be_ahead_of_a_receiver_that_first_does_something_else():
    assert max(ahead_of("LoopedBFS", 2, 4, 64)) == 62


def test_the_sender_that_would_wait_longest_may_be_ahead():
    order, placement = build_order("LoopedBFS", 2, 4, 8)
    limits = channel_limits(insert_communication(order, placement), placement)
    # Rank 0 runs stage 0 on every microbatch before it takes the first activation for stage 2; the others keep pace.
    assert [limits[Edge(stage, stage + 1), False].ahead for stage in range(3)] == [1, 6, 1]


@mark.parametrize(
    ("name", "pile", "room"), [("LoopedBFS", 16, 17), ("Interleaved1F1B", 5, 6), ("InterleavedZeroBubble", 8, 9)]
)
def test_gradients_for_a_rank_that_is_still_busy_with_a_later_stage_have_room_to_pile_up(name, pile, room):
    order, placement = build_order(name, 16, 32, 32)
    limits = channel_limits(insert_communication(order, placement), placement)
    around = limits[Edge(15, 16), True]
    assert (around.ahead, around.room) == (pile, room)


@mark.parametrize("name", ["GPipe", "1F1B", "ZB1P", "ZBVZeroBubble", "DualPipeV", "VHalf", "VMin"])
def test_where_nothing_piles_up_no_channel_has_more_room_than_its_receiver_needs(name):
    stages = 8 * (ORDERS[name].stages_per_rank_allowed or (1,))[0]
    order, placement = build_order(name, 8, stages, 16)
    order = insert_communication(order, placement)
    limits = channel_limits(order, placement)
    least = _Run(order, placement, None)
    least.to_the_end()
    assert [(limit.room, limit.ahead) for limit in limits.values()] == list(zip(least.room, least.ahead, strict=True))
