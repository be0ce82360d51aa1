"""DualPipe folded into a V: forwards and backwards in pairs that a custom function may interleave.

DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, and Liu et al.'s cut-in-half of it in
https://github.com/deepseek-ai/DualPipe.
"""

from __future__ import annotations

from pp_runtime.orders import ir
from pp_runtime.orders.chunks import without_surplus
from pp_runtime.orders.ir import Action, ActionType, Order
from pp_runtime.orders.limits import require_stages_per_rank


def dual_pipe_v(num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The DualPipeV order on V-shaped stages, for any number of microbatches."""
    require_stages_per_rank("DualPipeV", num_ranks, num_stages, num_microbatches, stages=2)
    # The pattern needs a microbatch for every stage; what is too many is taken out again.
    planned = max(num_stages, num_microbatches)
    return without_surplus(
        {rank: _rank_actions(rank, num_ranks, num_stages, planned) for rank in range(num_ranks)}, num_microbatches
    )


class _RankActions:
    """A rank's actions so far, and which microbatch each stage forwards and backwards next."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._forwards: dict[int, int] = {}
        self._backwards: dict[int, int] = {}
        self._weights_due: list[Action] = []
        self._weights_done = 0

    def forward(self, stage: int) -> None:
        self.actions.append(self._forward(stage))

    def backward(self, stage: int, kind: ActionType = ir.FULL_BACKWARD) -> None:
        action = self._backward(stage, kind)
        self.actions.append(action)
        if kind is ir.BACKWARD_INPUT:
            self._weights_due.append(action._replace(computation_type=ir.BACKWARD_WEIGHT))

    def overlapped(self, forward_stage: int, backward_stage: int) -> None:
        parts = (self._forward(forward_stage), self._backward(backward_stage, ir.FULL_BACKWARD))
        self.actions.append(Action(-1, ir.OVERLAP_F_B, None, parts))

    def weight_if_due(self) -> None:
        if self._weights_done < len(self._weights_due):
            self.actions.append(self._weights_due[self._weights_done])
            self._weights_done += 1

    def _forward(self, stage: int) -> Action:
        microbatch = self._forwards.get(stage, 0)
        self._forwards[stage] = microbatch + 1
        return Action(stage, ir.FORWARD, microbatch)

    def _backward(self, stage: int, kind: ActionType) -> Action:
        microbatch = self._backwards.get(stage, 0)
        self._backwards[stage] = microbatch + 1
        return Action(stage, kind, microbatch)


def _rank_actions(rank: int, num_ranks: int, num_stages: int, num_microbatches: int) -> list[Action]:
    down, up = rank, num_stages - 1 - rank
    ranks_after = num_ranks - 1 - rank
    to = _RankActions()
    # Forwards ahead, on the way down and then on both.
    for _ in range(2 * ranks_after):
        to.forward(down)
    for _ in range(rank + 1):
        to.forward(down)
        to.forward(up)
    # The first backwards on the way up are split: their weight gradients fill the wait.
    for _ in range(ranks_after):
        to.backward(up, ir.BACKWARD_INPUT)
        to.weight_if_due()
        to.forward(up)
    # The body: forward of one stage with backward of the other.
    for turn in range(num_microbatches - 2 * num_ranks + rank + 1):
        if turn == 0 and rank == num_ranks - 1:
            to.forward(down)  # the last rank turns round here; one after the other leaves less of a bubble
            to.backward(up)
        else:
            to.overlapped(down, up)
        to.overlapped(up, down)
    for _ in range(ranks_after):
        to.backward(up)
        to.overlapped(up, down)
    # The rest: halfway through, weight gradients begin to wait so that input gradients go first.
    _wind_down(to, rank, down, up, ranks_after)
    return to.actions


def _wind_down(to: _RankActions, rank: int, down: int, up: int, ranks_after: int) -> None:
    kind = ir.FULL_BACKWARD
    half = (rank + 1) // 2
    for turn in range(rank + 1):
        if turn == half and rank % 2 == 1:
            kind = ir.BACKWARD_INPUT
        to.backward(up, kind)
        if turn == half and rank % 2 == 0:
            kind = ir.BACKWARD_INPUT
        to.backward(down, kind)
    for _ in range(ranks_after):
        to.weight_if_due()
        to.backward(down, kind)
    for _ in range(rank + 1):
        to.weight_if_due()
