"""Many steps with random delays: whatever the timing, the numbers are the plain model's and nothing hangs."""

from __future__ import annotations

import os
import random
import time

import pytest
from torch import Tensor, nn

from tests import ranks
from tests.pipelines import EVERY_SCHEDULE, ONE_STAGE, Setting, Twins

# PP_TEST_SOAK=1000 runs that many steps of every schedule over both transports.
SOAK = "PP_TEST_SOAK" in os.environ
STEPS, LONGEST = int(os.environ.get("PP_TEST_SOAK", "12")), 0.003
CASES = [(schedule, "auto") for schedule in EVERY_SCHEDULE]
CASES += [(schedule, "c10d") for schedule in (EVERY_SCHEDULE if SOAK else ("1F1B", "ZBVZeroBubble"))]


class _Delays:
    """Sleeps now and then, before forwards and between backwards."""

    def __init__(self, rank: int) -> None:
        self.draw = random.Random(rank)

    def sleep(self) -> None:
        if self.draw.random() < 0.3:
            time.sleep(self.draw.random() * LONGEST)

    def before_forward(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.sleep()

    def after_forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self.in_backward)

    def in_backward(self, gradient: Tensor) -> None:
        self.sleep()


def _train(
    rank: int, schedule: str, stages_per_rank: int, microbatches: int, steps: int, transport: str = "auto"
) -> list[str]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    twins = Twins(rank, Setting(schedule, microbatches, stages_per_rank))
    delays = _Delays(rank)
    for module in twins.mine.values():
        module.register_forward_pre_hook(delays.before_forward)
        module.register_forward_hook(delays.after_forward)
    found = []
    for number in range(steps):
        found += twins.train(f"step {number}", twins.example.batch(2 * microbatches, number))
    return found


@pytest.mark.parametrize(("schedule", "transport"), CASES)
def test_random_delays_change_nothing(schedule: str, transport: str) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": 1 if schedule in ONE_STAGE else 2, "transport": transport}
    assert ranks.run(_train, 3, timeout=60 + STEPS, **arguments, microbatches=6, steps=STEPS) == [[]] * 3


@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2)])
def test_hundreds_of_messages_in_flight(schedule: str, stages_per_rank: int) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "microbatches": 150, "steps": 2}
    assert ranks.run(_train, 3, **arguments) == [[]] * 3
