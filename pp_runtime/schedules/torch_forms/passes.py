"""torch's names for the passes that make a whole order of a compute-only one, with torch's call forms and results.

Rows may hold None for idle steps. Unlike torch's functions these leave what they are given as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, Order, Placement, from_torch_form, ir, leaves, placement_of
from pp_runtime.planning import insert_unshard, merge_split_backward, verify, verify_communication

Row = Sequence[Action | None]
StageToRank = Callable[[int], int]

# For an action that reads from another stage: in which direction that stage stands, what receives it, what makes it.
_READS: dict[ActionType, tuple[int, ActionType, tuple[ActionType, ...]]] = {
    ir.FORWARD: (-1, ir.RECV_F, (ir.FORWARD,)),
    ir.FULL_BACKWARD: (1, ir.RECV_B, (ir.FULL_BACKWARD, ir.BACKWARD_INPUT)),
    ir.BACKWARD_INPUT: (1, ir.RECV_B, (ir.FULL_BACKWARD, ir.BACKWARD_INPUT)),
}
# For an action whose result goes on: in which direction, what sends it, what receives it there.
_GIVES: dict[ActionType, tuple[int, ActionType, ActionType]] = {
    ir.FORWARD: (1, ir.SEND_F, ir.RECV_F),
    ir.FULL_BACKWARD: (-1, ir.SEND_B, ir.RECV_B),
    ir.BACKWARD_INPUT: (-1, ir.SEND_B, ir.RECV_B),
}


def _add_unshard_reshard(compute_actions: Row, max_active_stages: int = 3) -> list[Action]:
    """One rank's actions with UNSHARD and RESHARD: :func:`pp_runtime.planning.passes.data_parallel.insert_unshard`."""
    return insert_unshard(from_torch_form({0: compute_actions}), max_active_stages)[0]


def _merge_bw(compute_actions: Row) -> list[Action]:
    """One rank's actions with adjacent I and W as B: :func:`pp_runtime.planning.passes.merge.merge_split_backward`."""
    return merge_split_backward(from_torch_form({0: compute_actions}))[0]


def _requires_reduce_grad(action_type: ActionType) -> bool:
    """Whether actions of this type make gradients of weights."""
    return action_type in (ir.BACKWARD_WEIGHT, ir.FULL_BACKWARD)


def _add_reduce_grad(actions: Row, n_microbatches: int) -> list[Action]:
    """One rank's actions with a REDUCE_GRAD after the ``n_microbatches``-th B or W of each stage."""
    done: Counter[int] = Counter()
    result: list[Action] = []
    for action in actions:
        if action is None:
            continue
        result.append(action)
        for part in leaves((action,)):
            if _requires_reduce_grad(part.computation_type):
                done[part.stage_index] += 1
                if done[part.stage_index] == n_microbatches:
                    result.append(Action(part.stage_index, ir.REDUCE_GRAD))
    return result


def _add_send_recv(compute_actions: Mapping[int, Row], stage_to_rank: StageToRank, num_stages: int) -> Order:
    """All ranks' actions with sends right after what makes their tensors, and each receive as early as its send.

    The ranks take turns, one action a turn. A receive comes into its rank's list when the sender's turn makes what it
    receives; the runtime itself waits as :func:`pp_runtime.planning.insert_communication` places them.
    InvalidOrderError where the ranks wait for each other.
    """
    result: Order = {rank: [] for rank in compute_actions}
    done: dict[int, set[Action]] = {rank: set() for rank in compute_actions}

    def append(rank: int, action: Action) -> None:
        result[rank].append(action)
        done[rank].update((action, *leaves((action,))))

    place = {rank: 0 for rank in sorted(compute_actions) if compute_actions[rank]}
    while place:
        moved = False
        for rank in list(place):
            action = compute_actions[rank][place[rank]]
            if action is not None:
                if not all(_may_begin(part, done[rank], num_stages) for part in leaves((action,))):
                    continue
                append(rank, action)
                for part in leaves((action,)):
                    for other_rank, message in _messages(part, rank, stage_to_rank, num_stages):
                        append(other_rank, message)
            moved = True
            place[rank] += 1
            if place[rank] == len(compute_actions[rank]):
                del place[rank]
        if not moved:
            waiting = ", ".join(f"rank {rank} at {compute_actions[rank][step]}" for rank, step in place.items())
            raise InvalidOrderError(f"The order deadlocks, so it has no sends and receives: {waiting}.")
    return result


def _may_begin(action: Action, done: set[Action], num_stages: int) -> bool:
    """Whether what the action reads has been received on its rank, or made there."""
    stage, kind, microbatch, _ = action
    if kind not in _READS:
        return True
    step, receive, makers = _READS[kind]
    if not 0 <= stage + step < num_stages:
        return True
    sources = (Action(stage, receive, microbatch), *(Action(stage + step, maker, microbatch) for maker in makers))
    return any(source in done for source in sources)


def _messages(action: Action, rank: int, stage_to_rank: StageToRank, num_stages: int) -> Iterator[tuple[int, Action]]:
    """The send of what the action made and its receive, each with its rank; none between stages of one rank."""
    stage, kind, microbatch, _ = action
    if kind not in _GIVES:
        return
    step, send, receive = _GIVES[kind]
    if 0 <= stage + step < num_stages and stage_to_rank(stage + step) != stage_to_rank(stage):
        yield rank, Action(stage, send, microbatch)
        yield stage_to_rank(stage + step), Action(stage + step, receive, microbatch)


def _defer_recv_ops(actions: Mapping[int, Sequence[Action]], stage_to_rank: StageToRank) -> Order:
    """All ranks' actions with each receive right before its consumer, by torch's rule for two ranks that both send.

    The lower of them posts its open receives from the other before it sends there. The runtime needs no such rule; its
    own pass is :func:`pp_runtime.planning.defer_receives`. InvalidOrderError for a receive without a consumer.
    """
    return {rank: _deferred(rank, row, stage_to_rank) for rank, row in actions.items()}


def _deferred(rank: int, actions: Sequence[Action], stage_to_rank: StageToRank) -> list[Action]:
    held: dict[Action, int] = {}  # receive -> the rank that it receives from
    result: list[Action] = []
    for action in actions:
        stage, kind, _, _ = action
        if kind in (ir.RECV_F, ir.RECV_B):
            held[action] = stage_to_rank(stage + (1 if kind is ir.RECV_B else -1))
            continue
        wanted: list[Action] = []
        if kind in (ir.SEND_F, ir.SEND_B):
            peer = stage_to_rank(stage + (1 if kind is ir.SEND_F else -1))
            wanted = [receive for receive, sender in held.items() if sender == peer > rank]
        for part in leaves((action,)):
            if part.computation_type in _READS:
                wanted.append(Action(part.stage_index, _READS[part.computation_type][1], part.microbatch_index))
        for receive in wanted:
            if held.pop(receive, None) is not None:
                result.append(receive)
        result.append(action)
    if held:
        raise InvalidOrderError(f"Rank {rank}: nothing on this rank consumes what {next(iter(held))} receives.")
    return result


def _validate_schedule(
    actions: Mapping[int, Row], pp_group_size: int, num_stages: int, num_microbatches: int
) -> dict[int, int]:
    """The rank of each stage, after the proof that the order is complete, backwards included, and does not deadlock.

    Raises InvalidOrderError, which is an AssertionError as torch's is.
    """
    return dict(enumerate(proved_placement(actions, pp_group_size, num_stages, num_microbatches, forward_only=False)))


def proved_placement(
    actions: Mapping[int, Row], pp_group_size: int, num_stages: int, num_microbatches: int, *, forward_only: bool
) -> Placement:
    """Where an order of a whole group has its stages, after the proof that it can run; else InvalidOrderError."""
    missing = sorted(set(range(pp_group_size)) - actions.keys())
    if missing or len(actions) != pp_group_size:
        raise InvalidOrderError(
            f"The order has actions for ranks {sorted(actions)}, but the group has ranks 0 to {pp_group_size - 1}."
        )
    for rank, row in actions.items():
        for step, action in enumerate(row):
            if action is not None and not isinstance(action, Action):
                raise InvalidOrderError(f"Rank {rank}, step {step}: {action!r} is not an action.")
    order = from_torch_form(actions)
    try:
        placement = placement_of(order)
    except ValueError as error:
        raise InvalidOrderError(str(error)) from error
    if len(placement) != num_stages:
        raise InvalidOrderError(f"The order is for {len(placement)} stages, not for {num_stages}.")
    with_comms = any(action.computation_type in ir.COMMUNICATION_TYPES for row in order.values() for action in row)
    check = verify_communication if with_comms else verify
    check(order, placement, num_microbatches, forward_only=forward_only)
    return placement
