"""Shortening an order by exchanging neighbours on its critical path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, Order, ir
from pp_runtime.timing import Costs, Simulation, activation_peaks, simulate

_ACTIONS_TO_SIMULATE = 600_000  # bounds the time: about a second


def improved_by_swaps(order: Order, costs: Costs, memory_cap: int | None) -> Order:
    """The order, shortened as long as exchanging two neighbours of a rank on the critical path shortens it.

    Stops after a fixed amount of simulation, so the result does not depend on the machine.
    """
    left = _ACTIONS_TO_SIMULATE
    size = sum(map(len, order.values()))
    played = simulate(order, costs)
    improved = True
    while improved:
        improved = False
        for rank, place in _exchangeable(played):
            if left < size:
                return order
            left -= size
            changed = _exchanged(order, rank, place)
            try:
                attempt = simulate(changed, costs)
            except InvalidOrderError:
                continue  # the exchange made two ranks wait for each other
            if attempt.makespan < played.makespan * (1 - 1e-9) and _fits(changed[rank], memory_cap):
                order, played, improved = changed, attempt, True
                break
    return order


def _exchanged(order: Order, rank: int, place: int) -> Order:
    actions = list(order[rank])
    actions[place], actions[place + 1] = actions[place + 1], actions[place]
    return {**order, rank: actions}


def _fits(actions: Sequence[Action], memory_cap: int | None) -> bool:
    return memory_cap is None or activation_peaks({0: actions})[0] <= memory_cap


def _exchangeable(played: Simulation) -> list[tuple[int, int]]:
    """(rank, place) on the critical path, last first, where the action and the next one may change places."""
    order, starts, ends = played.order, played.starts, played.ends
    made = _finish_times(played)
    rank = max(sorted(order), key=lambda rank: ends[rank][-1] if len(ends[rank]) else 0.0)
    place = len(order[rank]) - 1
    found = []
    while place > 0 or starts[rank][place] > 0:
        start = starts[rank][place]
        if place > 0 and ends[rank][place - 1] >= start:
            place -= 1
            if _independent(order[rank][place], order[rank][place + 1]):
                found.append((rank, place))
            continue
        sender = _sender(order[rank][place], made, played)
        if sender is None:
            break
        rank, place = sender
    return found


def _finish_times(played: Simulation) -> dict[tuple[bool, int, int | None], tuple[int, int]]:
    """Where the forward and the backward of each stage and microbatch stand."""
    made = {}
    for rank, actions in played.order.items():
        for place, action in enumerate(actions):
            for stage, kind, microbatch, _ in action.sub_actions or (action,):
                if kind is not ir.BACKWARD_WEIGHT:
                    made[kind is ir.FORWARD, stage, microbatch] = (rank, place)
    return made


def _sender(
    action: Action, made: Mapping[tuple[bool, int, int | None], tuple[int, int]], played: Simulation
) -> tuple[int, int] | None:
    """The action whose message this one started with: of those it reads, the one that ended last."""
    sources = []
    for stage, kind, microbatch, _ in action.sub_actions or (action,):
        if kind is ir.FORWARD:
            sources.append(made.get((True, stage - 1, microbatch)))
        elif kind is ir.BACKWARD_INPUT or kind is ir.FULL_BACKWARD:
            sources.append(made.get((False, stage + 1, microbatch)))
    found = [source for source in sources if source is not None]
    return max(found, key=lambda source: played.ends[source[0]][source[1]], default=None)


def _independent(first: Action, second: Action) -> bool:
    """Whether the second may come before the first on their rank, other ranks aside."""
    if first.sub_actions is not None or second.sub_actions is not None:
        return False
    if first.stage_index != second.stage_index:
        # Neighbouring stages on one rank: an exchange that breaks a dependency never ends, and is refused for that.
        return True
    # Microbatches of a stage keep their order, so that messages do.
    return first.microbatch_index != second.microbatch_index and first.computation_type is not second.computation_type
