"""Small random orders, valid by construction, and ways to break them."""

from hypothesis import strategies as st

from pp_runtime.orders.edges import Edge, adjacent_edges
from pp_runtime.orders.ir import OVERLAP_F_B, Action
from tests.helpers.exhaustive import Machine


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
