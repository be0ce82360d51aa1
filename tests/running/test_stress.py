"""Many steps with random delays before every action and message: the numbers stay the plain model's, nothing hangs."""

from __future__ import annotations

import os
import random
import time
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest

from pp_runtime.planning.lowering import _CALL, Lowering
from tests.helpers import ranks
from tests.helpers.pipelines import EVERY_SCHEDULE, ONE_STAGE, Setting, Twins

# PP_TEST_SOAK=1000 runs that many steps of every schedule over both transports.
SOAK = "PP_TEST_SOAK" in os.environ
STEPS, LONGEST = int(os.environ.get("PP_TEST_SOAK", "12")), 0.003
CASES = [(schedule, "auto") for schedule in EVERY_SCHEDULE]
CASES += [(schedule, "c10d") for schedule in (EVERY_SCHEDULE if SOAK else ("1F1B", "ZBVZeroBubble"))]


class _Delays:
    """Sleeps now and then, before any action, send and receive of a rank."""

    def __init__(self, rank: int) -> None:
        self.draw = random.Random(rank)
        self.slept = 0

    def sleep(self) -> None:
        if self.draw.random() < 0.2:
            self.slept += 1
            time.sleep(self.draw.random() * LONGEST)

    def in_programs(self) -> AbstractContextManager[object]:
        """While it stands, programs are made with a call of `sleep` before each of their instructions."""
        emit = Lowering._emit

        def delayed(lowering: Lowering, operation: int, *numbers: Any, **others: Any) -> None:
            if operation != _CALL:
                emit(lowering, _CALL, -1, None, callback=len(lowering._lowered.callbacks))
                lowering._lowered.callbacks.append(self.sleep)
                lowering._lowered.callback_names.append("delay")
            emit(lowering, operation, *numbers, **others)

        return mock.patch.object(Lowering, "_emit", delayed)


def _train(
    rank: int, schedule: str, stages_per_rank: int, microbatches: int, steps: int, transport: str = "auto"
) -> list[str]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    twins = Twins(rank, Setting(schedule, microbatches, stages_per_rank))
    delays = _Delays(rank)
    found = []
    with delays.in_programs():
        for number in range(steps):
            found += twins.train(f"step {number}", twins.example.batch(2 * microbatches, number))
    return found if delays.slept else [*found, "nothing was delayed"]


@pytest.mark.parametrize(("schedule", "transport"), CASES)
def test_random_delays_change_nothing(schedule: str, transport: str) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": 1 if schedule in ONE_STAGE else 2, "transport": transport}
    assert ranks.run(_train, 3, timeout=60 + STEPS, **arguments, microbatches=6, steps=STEPS) == [[]] * 3


@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2)])
def test_hundreds_of_messages_in_flight(schedule: str, stages_per_rank: int) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "microbatches": 150, "steps": 2}
    assert ranks.run(_train, 3, **arguments) == [[]] * 3
