"""Building an order action by action: each rank, when free, takes the best of what is ready."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from pp_runtime.orders import Action, Order, Placement, ir, stages_of_rank
from pp_runtime.timing import Costs


@dataclass(frozen=True, slots=True)
class Policy:
    """What "best" means. Every policy gives a right order within its cap; which is shortest depends on the costs."""

    cap: int  # activations a rank holds at most, counted until B or W; at least its stages
    reserve: int = 1  # activations that each stage of a rank leaves free for each later one; at least 1
    split: bool = True  # I and W, not B
    first: str = "backward"  # "backward", "forward", or "alternate" with what the rank did last
    forward_from_last: bool = True  # of several stages with a forward ready, the last or the first
    backward_from_last: bool = True
    debt: int = 1 << 30  # so many W left undone go before anything else
    freeing: bool = False  # a forward that the cap holds back lets W go before I
    patience: float = 0.0  # a W is not begun when better work comes within this share of its time

    def limit(self, chunk: int, num_chunks: int) -> int:
        """How many activations the rank may hold for stage number ``chunk`` of its ``num_chunks`` to add one.

        Limits grow with the stage. So of all stages that the cap stops, the last one would find its rank's memory
        freed by what is further on: it cannot stay stopped, and no policy deadlocks.
        """
        return max(chunk + 1, self.cap - (num_chunks - 1 - chunk) * self.reserve)


def greedy_order(placement: Placement, num_microbatches: int, costs: Costs, policy: Policy) -> Order:
    """The order of a chain of stages that comes of always following the policy."""
    return _Builder(placement, num_microbatches, costs, policy).build()


class _Builder:
    """Event simulation in which the next action of a rank is chosen when the rank is free, microbatches in turn."""

    def __init__(self, placement: Placement, num_microbatches: int, costs: Costs, policy: Policy) -> None:
        num_stages = len(placement)
        self.placement = placement
        self.num_microbatches = num_microbatches
        self.policy = policy
        self.forward_time = costs.by_stage("forward", num_stages)
        self.backward_time = costs.by_stage("backward_input" if policy.split else "full_backward", num_stages)
        self.weight_time = costs.by_stage("backward_weight", num_stages)
        self.transfer = costs.by_stage("transfer", num_stages)
        self.order: Order = {rank: [] for rank in range(max(placement) + 1)}
        self.stages = {rank: stages_of_rank(placement, rank) for rank in self.order}
        self.limits = {
            stage: policy.limit(chunk, len(stages))
            for stages in self.stages.values()
            for chunk, stage in enumerate(stages)
        }
        # When the input of each stage's next microbatches is there, in their order; and how many have been taken.
        self.forward_ready: list[list[float]] = [[] for _ in placement]
        self.backward_ready: list[list[float]] = [[] for _ in placement]
        self.forward_ready[0] = [0.0] * num_microbatches
        self.forwards = [0] * num_stages
        self.backwards = [0] * num_stages
        self.weights = [0] * num_stages
        self.held = dict.fromkeys(self.order, 0)
        self.free_at = dict.fromkeys(self.order, 0.0)
        self.backward_was_last = dict.fromkeys(self.order, False)
        self.channel_free = [[0.0, 0.0] for _ in placement]  # forward from, backward from a stage
        self.events = [(0.0, rank) for rank in self.order]

    def build(self) -> Order:
        while self.events:
            now, rank = heapq.heappop(self.events)
            if self.free_at[rank] <= now:
                self._choose(rank, now)
        return self.order

    def _choose(self, rank: int, now: float) -> None:
        policy, stages = self.policy, self.stages[rank]
        backward = self._first_ready(stages, now, self.backward_ready, self.backwards, policy.backward_from_last)
        open_stages = [stage for stage in stages if self.held[rank] < self.limits[stage]]
        forward = self._first_ready(open_stages, now, self.forward_ready, self.forwards, policy.forward_from_last)
        debts = (
            [(self.backwards[stage] - self.weights[stage], stage) for stage in stages] if policy.split else [(0, -1)]
        )
        debt, weight = max(debts)
        total_debt = sum(left for left, _ in debts)
        if total_debt and (
            total_debt >= policy.debt or (policy.freeing and forward is None and self._stopped(rank, now))
        ):
            self._weight(rank, weight, now)
        elif backward is not None and (forward is None or self._prefers_backward(rank)):
            self._backward(rank, backward, now)
        elif forward is not None:
            self._forward(rank, forward, now)
        elif debt and not self._comes_by(stages, open_stages, now, now + policy.patience * self.weight_time[weight]):
            self._weight(rank, weight, now)

    def _prefers_backward(self, rank: int) -> bool:
        if self.policy.first == "alternate":
            return not self.backward_was_last[rank]
        return self.policy.first == "backward"

    def _first_ready(
        self, stages: Sequence[int], now: float, ready: list[list[float]], taken: list[int], from_last: bool
    ) -> int | None:
        for stage in reversed(stages) if from_last else stages:
            place = taken[stage]
            if place < len(ready[stage]) and ready[stage][place] <= now:
                return stage
        return None

    def _stopped(self, rank: int, now: float) -> bool:
        """Whether a forward is ready that the cap does not allow."""
        return self._first_ready(self.stages[rank], now, self.forward_ready, self.forwards, True) is not None

    def _comes_by(self, stages: Sequence[int], open_stages: Sequence[int], now: float, time: float) -> bool:
        """Whether a backward, or a forward within the cap, is already under way and comes before a time."""
        for ready, taken, found in (
            (self.backward_ready, self.backwards, stages),
            (self.forward_ready, self.forwards, open_stages),
        ):
            for stage in found:
                if taken[stage] < len(ready[stage]) and now < ready[stage][taken[stage]] < time:
                    return True
        return False

    def _forward(self, rank: int, stage: int, now: float) -> None:
        end = self._take(rank, Action(stage, ir.FORWARD, self.forwards[stage]), now, self.forward_time[stage])
        self.forwards[stage] += 1
        self.held[rank] += 1
        self.backward_was_last[rank] = False
        if stage + 1 < len(self.placement):
            self._deliver(stage, stage + 1, 0, end, self.forward_ready[stage + 1])
        else:
            self.backward_ready[stage].append(end)

    def _backward(self, rank: int, stage: int, now: float) -> None:
        kind = ir.BACKWARD_INPUT if self.policy.split else ir.FULL_BACKWARD
        end = self._take(rank, Action(stage, kind, self.backwards[stage]), now, self.backward_time[stage])
        self.backwards[stage] += 1
        self.backward_was_last[rank] = True
        if not self.policy.split:
            self.held[rank] -= 1
        if stage > 0:
            self._deliver(stage, stage - 1, 1, end, self.backward_ready[stage - 1])

    def _weight(self, rank: int, stage: int, now: float) -> None:
        self._take(rank, Action(stage, ir.BACKWARD_WEIGHT, self.weights[stage]), now, self.weight_time[stage])
        self.weights[stage] += 1
        self.held[rank] -= 1

    def _take(self, rank: int, action: Action, now: float, time: float) -> float:
        self.order[rank].append(action)
        end = self.free_at[rank] = now + time
        heapq.heappush(self.events, (end, rank))
        return end

    def _deliver(self, source: int, destination: int, direction: int, now: float, ready: list[float]) -> None:
        receiver = self.placement[destination]
        if self.placement[source] != receiver:
            now = max(now, self.channel_free[source][direction]) + self.transfer[min(source, destination)]
            self.channel_free[source][direction] = now
        ready.append(now)
        heapq.heappush(self.events, (now, receiver))
