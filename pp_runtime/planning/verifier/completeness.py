"""Whether each stage runs every microbatch's actions on its own rank, once, and in a possible sequence there."""

from __future__ import annotations

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, Order, Placement, ir
from pp_runtime.planning.verifier.marking import refuse

# What has run for one stage and microbatch.
_NOTHING, _AFTER_F, _AFTER_I, _DONE = range(4)
_STEP: dict[ActionType, tuple[int, int]] = {
    ir.FORWARD: (_NOTHING, _AFTER_F),
    ir.FULL_BACKWARD: (_AFTER_F, _DONE),
    ir.BACKWARD_INPUT: (_AFTER_F, _AFTER_I),
    ir.BACKWARD_WEIGHT: (_AFTER_I, _DONE),
}
_HAS_RUN = {
    _AFTER_F: "only its F has run",
    _AFTER_I: "only its F and I have run",
    _DONE: "its backward has run already",
}


def check_completeness(order: Order, placement: Placement, num_microbatches: int, *, forward_only: bool) -> None:
    """Raise InvalidOrderError for missing, doubled, misplaced and impossible actions, as far as one rank shows them."""
    _check_ranks(order, placement)
    progress = bytearray(len(placement) * num_microbatches)
    for rank, actions in order.items():
        mine = {stage for stage, holder in enumerate(placement) if holder == rank}
        reduced: set[int] = set()
        for position, action in enumerate(actions):
            if action[1] is ir.OVERLAP_F_B and not action[3]:
                refuse(order, rank, position, "an OVERLAP_F_B has at least one part.")
            for stage, kind, microbatch, _ in action[3] or (action,):
                if stage not in mine:
                    _refuse_stage(order, rank, position, stage, placement)
                step = _STEP.get(kind)
                if step is None:
                    if kind in ir.COMMUNICATION_TYPES:
                        continue
                    _check_stage_action(order, rank, position, action, reduced, progress, num_microbatches)
                    continue
                if microbatch is None or not 0 <= microbatch < num_microbatches:
                    refuse(order, rank, position, f"microbatch {microbatch} is not one of 0 to {num_microbatches - 1}.")
                place = stage * num_microbatches + microbatch
                if progress[place] != step[0]:
                    _refuse_sequence(order, rank, position, Action(stage, kind, microbatch), progress[place])
                if forward_only and kind is not ir.FORWARD:
                    refuse(order, rank, position, "a forward-only order has no backward.")
                progress[place] = step[1]
    _check_all_ran(order, placement, num_microbatches, progress, _AFTER_F if forward_only else _DONE)


def _check_ranks(order: Order, placement: Placement) -> None:
    for stage, rank in enumerate(placement):
        if rank not in order:
            raise InvalidOrderError(
                f"Stage {stage} is on rank {rank}, but the order has actions for ranks {sorted(order)} only."
            )


def _refuse_stage(order: Order, rank: int, position: int, stage: int, placement: Placement) -> None:
    if 0 <= stage < len(placement):
        refuse(order, rank, position, f"stage {stage} is on rank {placement[stage]}; a stage has one rank.")
    refuse(order, rank, position, f"there is no stage {stage}; the stages are 0 to {len(placement) - 1}.")


def _refuse_sequence(order: Order, rank: int, position: int, action: Action, has_run: int) -> None:
    stage, kind, microbatch, _ = action
    if kind is ir.FORWARD:
        refuse(order, rank, position, f"the forward of microbatch {microbatch} on stage {stage} has run already.")
    if has_run == _NOTHING:
        refuse(order, rank, position, f"{stage}F{microbatch} has not run on this rank before it.")
    if kind is ir.BACKWARD_WEIGHT and has_run == _AFTER_F:
        refuse(order, rank, position, f"{stage}I{microbatch} has not run on this rank before it.")
    refuse(
        order, rank, position, f"it cannot follow: for microbatch {microbatch} on stage {stage} {_HAS_RUN[has_run]}."
    )


def _check_stage_action(
    order: Order,
    rank: int,
    position: int,
    action: Action,
    reduced: set[int],
    progress: bytearray,
    num_microbatches: int,
) -> None:
    """UNSHARD and RESHARD may stand anywhere; REDUCE_GRAD once, after the stage's last backward."""
    stage, kind, _, _ = action
    if kind is ir.UNSHARD or kind is ir.RESHARD:
        return
    if kind is not ir.REDUCE_GRAD:
        refuse(order, rank, position, f"{kind.value} cannot stand here.")
    if stage in reduced:
        refuse(order, rank, position, f"the gradients of stage {stage} have been reduced already.")
    reduced.add(stage)
    unfinished = _first_other_than(progress, _DONE, stage * num_microbatches, (stage + 1) * num_microbatches)
    if unfinished is not None:
        microbatch = unfinished - stage * num_microbatches
        refuse(
            order, rank, position, f"the backward of microbatch {microbatch} on stage {stage} has not run before it."
        )


def _first_other_than(progress: bytearray, value: int, start: int, stop: int) -> int | None:
    part = progress[start:stop]
    if part.count(value) == len(part):
        return None
    return start + next(place for place, state in enumerate(part) if state != value)


def _check_all_ran(
    order: Order, placement: Placement, num_microbatches: int, progress: bytearray, complete: int
) -> None:
    place = _first_other_than(progress, complete, 0, len(progress))
    if place is None:
        return
    stage, microbatch = divmod(place, num_microbatches)
    has_run = progress[place]
    kinds = {_NOTHING: "F", _AFTER_F: "B (nor I and W)", _AFTER_I: "W"}
    rank = placement[stage]
    refuse(
        order, rank, len(order[rank]), f"the order has no {kinds[has_run]} of microbatch {microbatch} on stage {stage}."
    )
