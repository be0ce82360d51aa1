"""The shape that the 1F1B family shares: some forwards ahead, then one forward and one backward in turn.

    forwards ahead      F F F
    in turn                   F B F B F B
    the rest                              B B B

With the backward split in two, B becomes I, and the W of an I follows a fixed number of I's later.
"""

from __future__ import annotations

from collections.abc import Sequence

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action

Work = Sequence[tuple[int, int]]
"""(stage, microbatch) pairs in the order in which a rank does them."""


def alternate(forwards: Work, backwards: Work, ahead: int) -> list[Action]:
    """``ahead`` forwards, then forward and backward in turn."""
    actions = [Action(stage, ir.FORWARD, microbatch) for stage, microbatch in forwards[:ahead]]
    append = actions.append
    for (stage, microbatch), (back_stage, back_microbatch) in zip(forwards[ahead:], backwards, strict=False):
        append(Action(stage, ir.FORWARD, microbatch))
        append(Action(back_stage, ir.FULL_BACKWARD, back_microbatch))
    actions += [Action(stage, ir.FULL_BACKWARD, microbatch) for stage, microbatch in backwards[len(forwards) - ahead :]]
    return actions


def alternate_split(forwards: Work, backwards: Work, ahead: int, weight_delay: int) -> list[Action]:
    """As :func:`alternate`, with I for B, and each W ``weight_delay`` I's after its own."""
    actions = [Action(stage, ir.FORWARD, microbatch) for stage, microbatch in forwards[:ahead]]
    append = actions.append
    rest = forwards[ahead:]
    for step, (stage, microbatch) in enumerate(backwards):
        if step < len(rest):
            append(Action(rest[step][0], ir.FORWARD, rest[step][1]))
        append(Action(stage, ir.BACKWARD_INPUT, microbatch))
        if step >= weight_delay:
            stage, microbatch = backwards[step - weight_delay]
            append(Action(stage, ir.BACKWARD_WEIGHT, microbatch))
    actions += [
        Action(stage, ir.BACKWARD_WEIGHT, microbatch)
        for stage, microbatch in backwards[max(len(backwards) - weight_delay, 0) :]
    ]
    return actions


def depth_first_work(num_ranks: int, num_stages: int, num_microbatches: int, rank: int) -> tuple[Work, Work, int]:
    """A rank's forwards and backwards when its stages take turns, and how many forwards the last rank must be ahead.

    Microbatches go in rounds of about ``num_ranks``; a round's first backward needs its forwards of all stages but the
    last. Where rounds cannot be equal, the larger come first, so that no round needs more ahead than the first.
    """
    stages = range(rank, num_stages, num_ranks)
    num_rounds = max(1, num_microbatches // num_ranks)
    size, larger = divmod(num_microbatches, num_rounds)
    forwards: list[tuple[int, int]] = []
    backwards: list[tuple[int, int]] = []
    start = 0
    for number in range(num_rounds):
        microbatches = range(start, start + size + (number < larger))
        start = microbatches.stop
        forwards += [(stage, microbatch) for stage in stages for microbatch in microbatches]
        backwards += [(stage, microbatch) for stage in reversed(stages) for microbatch in microbatches]
    return forwards, backwards, (len(stages) - 1) * (size + (larger > 0))
