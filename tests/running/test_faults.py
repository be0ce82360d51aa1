"""Faults at random actions of every schedule: every rank raises soon, names the culprit, and keeps nothing of the step.

``PP_TEST_FAULTS=20`` plants that many times as many faults. tests/fault_table.py measures them for docs/faults.md.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.helpers import api, ranks
from tests.helpers.faults import DEADLINE, HELD_UP, LOST, SURVIVED, complaints, draw, play_all, play_one
from tests.helpers.pipelines import EVERY_SCHEDULE

pytestmark = api.ours_only("the other ranks hang until the process group's time-out")

TIMES = int(os.environ.get("PP_TEST_FAULTS", "1"))
LIMIT = 10.0  # seconds; docs/faults.md has what is measured


PLACES = [(2, "auto"), (4, "auto"), (4, "c10d")]


@pytest.mark.parametrize(("size", "transport"), PLACES)
def test_every_rank_raises_and_the_group_goes_on(size: int, transport: str, tmp_path: Path) -> None:
    generator = random.Random(f"{size} {transport}")
    schedules = generator.sample(EVERY_SCHEDULE, len(EVERY_SCHEDULE))
    kinds = [kind for kind in SURVIVED for _ in range(TIMES)]
    faults = [draw(generator, kind, size, schedules[i % len(schedules)]) for i, kind in enumerate(kinds)]
    arguments = {"size": size, "faults": faults, "folder": str(tmp_path), "transport": transport}
    found = ranks.run(play_all, size, timeout=60 + 10 * len(faults), **arguments)
    for fault, *seen in zip(faults, *found, strict=True):
        assert complaints(fault, seen, LIMIT, transport) == []


@pytest.mark.parametrize(("size", "transport"), PLACES)
@pytest.mark.parametrize("kind", [*LOST, *HELD_UP])
def test_a_rank_that_is_lost_or_held_up_is_named(kind: str, size: int, transport: str, tmp_path: Path) -> None:
    generator = random.Random(f"{kind} {size} {transport}")
    for number in range(TIMES):
        fault = draw(generator, kind, size)
        folder = tmp_path / str(number)
        folder.mkdir()
        deaths = [fault.owner(size)] if kind in LOST else []
        arguments = {"size": size, "fault": fault, "folder": str(folder), "transport": transport}
        found = ranks.run(play_one, size, deaths=deaths, **arguments)
        assert complaints(fault, found, LIMIT, transport) == []
        if kind in HELD_UP:
            waiting = [seen for rank, seen in enumerate(found) if rank != fault.owner(size)]
            assert all(f"the deadline is {DEADLINE:g} s" in seen.text for seen in waiting), waiting
