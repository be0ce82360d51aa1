"""Orders in a V that repeat one microbatch's block of actions, and so control how long activations live.

Qi et al., "Pipeline Parallelism with Controllable Memory", 2024, arXiv:2405.15362. With F, I and W of one unit each, a
rank has six actions a microbatch. The block says when each of them runs for microbatch 0; microbatch m runs 6m units
later. So two actions of a rank never meet if their times differ modulo six. An activation lives from its F to its W,
and a rank holds (sum of its two lifespans) / 6 of them: slower steps between neighbours cost memory and leave less of
a bubble. Two ranks, all steps of one unit:

    rank 0   0F  .   .   3F  3I  3W  .   0I  0W
    rank 1   .   1F  2F  .   .   2I  1I  .   .   2W  1W
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from pp_runtime.orders import ir
from pp_runtime.orders.ir import Action, ActionType, Order

_PERIOD = 6


@dataclass(frozen=True, slots=True)
class Steps:
    """Time units from a stage's start to its neighbour's, on each of the four ways through the V."""

    forward_down: int
    forward_up: int
    backward_down: int  # through the up stages: the gradient goes from rank 0 to the last
    backward_up: int


@dataclass(frozen=True, slots=True)
class _Starts:
    """When microbatch 0 begins each way through the V."""

    forward_up: int
    backward_down: int
    backward_up: int


def block_order(num_ranks: int, num_microbatches: int, steps: Steps) -> Order:
    """The order in which the repeated block runs, two stages a rank."""
    starts = _earliest_starts(num_ranks, steps)
    order: Order = {}
    for rank in range(num_ranks):
        block = _block_of_rank(rank, num_ranks, steps, starts)
        order[rank] = list(_repeated(block, num_microbatches))
    return order


def _times(rank: int, num_ranks: int, steps: Steps, starts: _Starts) -> tuple[int, int, int, int]:
    """When a rank runs the F of its down and its up stage, and the I of its up and its down stage."""
    from_last = num_ranks - 1 - rank
    return (
        steps.forward_down * rank,
        starts.forward_up + steps.forward_up * from_last,
        starts.backward_down + steps.backward_down * rank,
        starts.backward_up + steps.backward_up * from_last,
    )


def _earliest_starts(num_ranks: int, steps: Steps) -> _Starts:
    """The starts that end the block soonest, of those with which no two actions of a rank meet."""
    hops = num_ranks - 1
    best: tuple[tuple[int, ...], _Starts] | None = None
    for wait_1, wait_2, wait_3 in product(range(_PERIOD), repeat=3):
        forward_up = steps.forward_down * hops + 1 + wait_1
        backward_down = forward_up + steps.forward_up * hops + 1 + wait_2
        backward_up = backward_down + steps.backward_down * hops + 1 + wait_3
        starts = _Starts(forward_up, backward_down, backward_up)
        # Equal steps and the period of six make rank r + 6 meet where rank r does.
        meets = any(
            len({time % _PERIOD for time in _times(rank, num_ranks, steps, starts)}) < 4
            for rank in range(min(num_ranks, _PERIOD))
        )
        key = (backward_up, backward_down, forward_up)
        if not meets and (best is None or key < best[0]):
            best = key, starts
    if best is None:
        raise ValueError(f"No block with {steps} repeats every {_PERIOD} units on {num_ranks} ranks.")
    return best[1]


def _block_of_rank(rank: int, num_ranks: int, steps: Steps, starts: _Starts) -> list[tuple[int, int, ActionType]]:
    """(time, stage, kind) of a rank's six actions for microbatch 0; each W takes the first time free after its I."""
    down, up = rank, 2 * num_ranks - 1 - rank
    times = _times(rank, num_ranks, steps, starts)
    block = list(
        zip(times, (down, up, up, down), (ir.FORWARD, ir.FORWARD, ir.BACKWARD_INPUT, ir.BACKWARD_INPUT), strict=True)
    )
    taken = {time % _PERIOD for time in times}
    for time, stage in ((times[2], up), (times[3], down)):
        while time % _PERIOD in taken:
            time += 1
        taken.add(time % _PERIOD)
        block.append((time, stage, ir.BACKWARD_WEIGHT))
    return block


def _repeated(block: list[tuple[int, int, ActionType]], num_microbatches: int) -> Iterator[Action]:
    """The block's actions for all microbatches, by time: time t + 6m has the action whose time is t modulo six."""
    lanes = sorted(block, key=lambda entry: entry[0] % _PERIOD)
    lags = [(time // _PERIOD, stage, kind) for time, stage, kind in lanes]
    for turn in range(num_microbatches + max(lag for lag, _, _ in lags)):
        for lag, stage, kind in lags:
            if 0 <= turn - lag < num_microbatches:
                yield Action(stage, kind, turn - lag)
