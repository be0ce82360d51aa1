"""Ranks that are lost or late, where less is known: on other hosts, with the store gone, outside a step."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import api, ranks
from tests.helpers.failures import PROMPT, Met, meet
from tests.helpers.models import WIDTH, rows_of_floats
from tests.helpers.pipelines import make_schedule, make_stages, step

pytestmark = api.ours_only("waits for the process group's time-out")

MICROBATCHES = 4


class Stops(nn.Module):
    """Calls ``action`` in its last microbatch of the second step, in the forward or the backward."""

    def __init__(self, action: Any, backward: bool = False) -> None:
        super().__init__()
        self.linear, self.calls, self.action, self.backward = nn.Linear(WIDTH, WIDTH), 0, action, backward

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.linear(x)
        if self.action is not None and self.calls == 2 * MICROBATCHES:
            if self.backward:
                y.register_hook(lambda gradient: self.action())
            else:
                self.action()
        return y


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _two_steps(rank: int, size: int, action: Any, deadline: float | None = None, backward: bool = False) -> Met | None:
    stages = make_stages({rank: Stops(action, backward)}, size)
    pipeline = make_schedule("1F1B", stages, MICROBATCHES, nn.functional.mse_loss)
    step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 0))
    if deadline is not None:
        pipeline.deadline = deadline
    return meet(lambda: step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 1)))


def _on_a_host_of_its_own(rank: int) -> None:
    """Let this rank believe that no other is on its host: no process to watch, no memory to share."""
    from pp_runtime.running.agreement import agreement

    agreement._host = lambda: f"host of rank {rank}"  # type: ignore[assignment]
    os.environ["PP_RUNTIME_TRANSPORT"] = "c10d"


def _lose_one(rank: int, victim: int) -> Met | None:
    _on_a_host_of_its_own(rank)
    return _two_steps(rank, 4, _die if rank == victim else None)


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_rank_lost_on_another_host_is_named_by_all(victim: int) -> None:
    for rank, met in enumerate(ranks.run(_lose_one, 4, deaths=[victim], victim=victim)):
        if rank != victim:
            assert met is not None and met.is_a("PipelineError") and met.seconds < PROMPT, met
            assert met.facts["rank"] == victim, f"rank {rank}: {met}"


class Dies(nn.Module):
    """Dies in 1F1 of the second step, once ``ready`` lets it; ``slow`` is called in 1B0 of the first."""

    def __init__(self, slow: Callable[[], None], ready: Callable[[], None]) -> None:
        super().__init__()
        self.linear, self.calls, self.slow, self.ready = nn.Linear(WIDTH, WIDTH), 0, slow, ready

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == MICROBATCHES + 2:
            self.ready()
            _die()
        y = self.linear(x)
        if self.calls == 1:
            y.register_hook(lambda gradient: self.slow())
        return y


def _tell_and_die(rank: int, goes_on: bool) -> Met | None:
    _on_a_host_of_its_own(rank)
    assert dist.group.WORLD is not None
    store = dist.distributed_c10d._get_process_group_store(dist.group.WORLD)

    def told() -> bytes:
        key = "pp_runtime/0/whereabouts/1"
        return store.get(key) if store.check([key]) else b""

    def slow() -> None:
        while goes_on and not told():
            time.sleep(0.005)
        pipeline.deadline = 1000.0 if goes_on else 2.0  # a look at where the rank is every 2.5 or 0.25 s

    def ready() -> None:
        since, first = time.monotonic(), told()
        while goes_on and told() and time.monotonic() - since < 1.5:
            time.sleep(0.005)
        while not goes_on and (told() == first or not told() or not first):
            first = first or told()
            time.sleep(0.005)

    stages = make_stages({rank: Dies(slow, ready) if rank else Stops(None)}, 2)
    pipeline = make_schedule("1F1B", stages, MICROBATCHES, nn.functional.mse_loss)
    pipeline.deadline = 2.0
    step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 0))
    return meet(lambda: step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 1)))


def test_a_rank_that_dies_is_not_blamed_for_where_it_was_in_the_step_before() -> None:
    met, _ = ranks.run(_tell_and_die, 2, deaths=[1], goes_on=True)
    assert met is not None and met.facts["rank"] == 1, met
    assert met.facts["action"] is None and "before, it was" not in met.text, met


def test_where_a_lost_rank_was_is_told_with_how_long_ago_that_is_known() -> None:
    """It told twice that it was there, so what is known is the second time's."""
    met, _ = ranks.run(_tell_and_die, 2, deaths=[1], goes_on=False)
    assert met is not None and met.facts["rank"] == 1, met
    assert re.search(r"; \d\.\d s before, it was in 1F1", met.text), met
    assert met.facts["action"] is None, met


def _lose_the_store(rank: int, folder: str, apart: bool) -> Met | None:
    """As in a program that was started without torchrun: rank 0 keeps the store."""
    from pp_runtime.running.agreement import agreement

    if apart:
        _on_a_host_of_its_own(rank)
    port = Path(folder, "port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.with_suffix(".new").write_text(str(store.port))
        port.with_suffix(".new").rename(port)
    else:
        while not port.exists():
            time.sleep(0.005)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()))
    assert dist.group.WORLD is not None
    agreement._stores[dist.group.WORLD] = agreement._GroupStore(store)
    return _two_steps(rank, 3, _die if rank == 0 else None)


@pytest.mark.parametrize("apart", [False, True])
def test_the_rank_that_keeps_the_store_is_lost(apart: bool, tmp_path: Path) -> None:
    _, *others = ranks.run(_lose_the_store, 3, deaths=[0], folder=str(tmp_path), apart=apart)
    for met in others:
        assert met is not None and met.is_a("PipelineError") and met.seconds < PROMPT, met
        assert "rank 0" in met.text, met.text
        assert apart or met.facts["rank"] == 0, met


def _look_away(rank: int, folder: str, backward: bool) -> Met | None:
    released = Path(folder, "released")

    def wait() -> None:
        while not released.exists():
            time.sleep(0.005)

    met = _two_steps(rank, 3, wait if rank == 1 else None, deadline=0.8, backward=backward)
    released.touch()
    return met


@pytest.mark.parametrize("backward", [False, True])
def test_who_waits_for_whom_is_told(backward: bool, tmp_path: Path) -> None:
    number = r"\d+\.\d s"
    action = "1B3" if backward else "1F3"
    # Who raises first waited for rank 1, for somebody that waits for it, or for the end of the step.
    told = (
        rf"rank \d waited {number} for (rank \d to finish the step|\dSEND_[FB]\d from rank \d)"
        rf"(, which has waited {number} for \dSEND_[FB]\d from rank \d)?, which has been in {action} for {number};"
    )
    for met in ranks.run(_look_away, 3, folder=str(tmp_path), backward=backward):
        assert met is not None and met.is_a("PipelineError"), met
        assert re.search(told, met.text), met.text
        assert (met.facts["rank"], met.facts["stage"], met.facts["action"]) == (1, 1, action), met


def _stay_outside(rank: int, folder: str) -> Met | None:
    stages = make_stages({rank: nn.Linear(WIDTH, WIDTH)}, 2)
    pipeline = make_schedule("1F1B", stages, MICROBATCHES, nn.functional.mse_loss)
    step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 0))
    pipeline.deadline = 0.5
    if rank == 0:
        while not Path(folder, "over").exists():
            time.sleep(0.005)
    met = meet(lambda: step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 1)))
    Path(folder, "over").touch()
    return met


def test_a_rank_that_does_not_come_to_the_step_is_named(tmp_path: Path) -> None:
    for met in ranks.run(_stay_outside, 2, folder=str(tmp_path)):
        assert met is not None and met.is_a("PipelineError") and met.facts["rank"] == 0, met
        assert "rank 1 waited" in met.text and "which has been outside step() for" in met.text, met.text


def _set_deadlines(rank: int) -> list[str]:
    found = []
    for text in ("soon", "0", "-3", "nan"):
        os.environ["PP_RUNTIME_DEADLINE"] = text
        met = meet(lambda: make_schedule("GPipe", make_stages({0: nn.Identity()}, 1), 1, None))
        assert met is not None and met.is_a("PipelineUsageError"), met
        found.append(met.text)
    os.environ["PP_RUNTIME_DEADLINE"] = "7.5"
    pipeline = make_schedule("GPipe", make_stages({0: nn.Identity()}, 1), 1, None)
    assert pipeline.deadline == 7.5
    pipeline.deadline = 3
    assert pipeline._ensure_runtime().deadline == 3.0
    met = meet(lambda: setattr(pipeline, "deadline", 0))
    assert met is not None and met.is_a("PipelineUsageError"), met
    return found


def test_a_deadline_is_a_number_of_seconds() -> None:
    (texts,) = ranks.run(_set_deadlines, 1)
    assert all("PP_RUNTIME_DEADLINE" in text and "seconds" in text for text in texts), texts
