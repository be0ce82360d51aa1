"""A failure on one rank is soon everyone's, with its place and reason; nobody waits for the group's time-out."""

from __future__ import annotations

import copy
import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import api, ranks
from tests.helpers.failures import PROMPT, Met, meet
from tests.helpers.models import WIDTH, rows_of_floats
from tests.helpers.pipelines import held_by, make_schedule, make_stages, step

pytestmark = api.ours_only("the other ranks hang until the process group's time-out")

SCHEDULES = [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]
RANKS, MICROBATCHES, FAILING = 3, 6, 4  # the microbatch that fails is not the first


class BoomError(Exception):
    """What the user's own code raises."""


class _BackwardBoom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fails: bool) -> Tensor:
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.fails:
            raise BoomError("boom in backward")
        return gradient, None


def _raise_from_hook(gradient: Tensor) -> None:
    raise BoomError("boom in hook")


class Fragile(nn.Module):
    """Fails at one microbatch in the way asked for; ``armed`` says whether it does."""

    def __init__(self, way: str | None) -> None:
        super().__init__()
        self.linear, self.way, self.calls, self.armed = nn.Linear(WIDTH, WIDTH), way, 0, False

    def forward(self, x: Tensor) -> Tensor:
        fails = self.armed and self.calls % MICROBATCHES == FAILING
        self.calls += 1
        way = self.way if fails else None
        if way == "forward":
            raise BoomError("boom in forward")
        if way == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "shape":
            x = x[:, :1]
        y = _BackwardBoom.apply(self.linear(x), way == "backward")
        if way == "hook":
            y.register_hook(_raise_from_hook)
        if way == "dict":
            return {"wrong": y}  # type: ignore[return-value]
        return y


def _fail(rank: int, schedule: str, stages_per_rank: int, stage: int, way: str) -> tuple[Met | None, bool]:
    """One good step, then one that fails; what this rank met, and whether its parameters stayed as they were."""
    modules = {
        index: Fragile(way if index == stage else None) for index in held_by(rank, schedule, RANKS, stages_per_rank)
    }
    losses = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal losses
        losses += 1
        if way == "loss" and losses == MICROBATCHES + FAILING + 1:
            raise BoomError("boom in loss")
        return nn.functional.mse_loss(output, target)

    stages = make_stages(modules, RANKS * stages_per_rank)
    pipeline = make_schedule(schedule, stages, MICROBATCHES, loss_fn)
    step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 0))
    before = {index: copy.deepcopy(module.state_dict()) for index, module in modules.items()}
    for module in modules.values():
        module.armed = True
    met = meet(lambda: step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 1)))
    unchanged = all(
        torch.equal(value, before[index][name])
        for index, module in modules.items()
        for name, value in module.state_dict().items()
    )
    return met, unchanged


def _check(found: list[tuple[Met | None, bool]], culprit: int, stage: int, reason: str, facts: dict[str, Any]) -> None:
    for rank, (met, unchanged) in enumerate(found):
        assert met is not None, f"rank {rank} met no error"
        assert met.seconds < PROMPT, f"rank {rank} learnt of it after {met.seconds:.1f} s: {met.text}"
        assert unchanged, f"rank {rank}: parameters changed"
        assert reason in met.text, f"rank {rank}: {met.text}"
        if rank == culprit:
            assert met.is_a("BoomError") or (met.is_a("PipelineError") and met.cause == "BoomError"), met
        else:
            assert met.is_a("PipelineError"), f"rank {rank}: {met.kinds}"
            told = {"rank": culprit, "stage": stage, **facts}
            assert {name: met.facts[name] for name in told} == told, f"rank {rank}: {met}"


def _owner(schedule: str, stages_per_rank: int, stage: int) -> int:
    return next(rank for rank in range(RANKS) if stage in held_by(rank, schedule, RANKS, stages_per_rank))


@pytest.mark.parametrize("way", ["forward", "backward", "hook"])
@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_an_exception_in_a_stage_reaches_every_rank(
    schedule: str, stages_per_rank: int, position: str, way: str
) -> None:
    last = RANKS * stages_per_rank - 1
    stage = {"first": 0, "middle": 1, "last": last}[position]
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "stage": stage, "way": way}
    facts = {"microbatch": FAILING} if way == "forward" else {}
    found = ranks.run(_fail, RANKS, **arguments)
    _check(found, _owner(schedule, stages_per_rank, stage), stage, f"boom in {way}", facts)


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_an_exception_in_the_loss_reaches_every_rank(schedule: str, stages_per_rank: int) -> None:
    last = RANKS * stages_per_rank - 1
    found = ranks.run(_fail, RANKS, schedule=schedule, stages_per_rank=stages_per_rank, stage=last, way="loss")
    _check(found, _owner(schedule, stages_per_rank, last), last, "boom in loss", {"microbatch": FAILING})


@pytest.mark.parametrize("way", ["dict", "shape"])
def test_a_wrong_output_or_input_is_named_on_every_rank(way: str) -> None:
    found = ranks.run(_fail, RANKS, schedule="1F1B", stages_per_rank=1, stage=1, way=way)
    for rank, (met, unchanged) in enumerate(found):
        assert met is not None and met.seconds < PROMPT and unchanged, f"rank {rank}: {met}"
        assert ("dict" if way == "dict" else "shapes cannot be multiplied") in met.text, f"rank {rank}: {met.text}"
        # A dict can be sent, so it is the next stage that cannot use it.
        stage = 2 if way == "dict" else 1
        assert met.facts["stage"] == stage or rank == stage, f"rank {rank}: {met}"


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_a_killed_rank_is_noticed_by_its_peers(schedule: str, stages_per_rank: int) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "stage": 1, "way": "death"}
    found = ranks.run(_fail, RANKS, deaths=[1], **arguments)
    for rank in (0, 2):
        met, unchanged = found[rank]
        assert met is not None and met.seconds < PROMPT and unchanged, f"rank {rank}: {met}"
        assert met.is_a("PipelineError"), f"rank {rank}: {met}"
        assert "rank 1" in met.text, f"rank {rank}: {met.text}"


def _fail_then_go_on(rank: int) -> tuple[Met | None, Met | None]:
    module = Fragile("forward" if rank == 1 else None)
    stages = make_stages({rank: module}, RANKS)
    pipeline = make_schedule("1F1B", stages, MICROBATCHES, nn.functional.mse_loss)
    module.armed = True
    first = meet(lambda: step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 0)))
    module.armed = False
    return first, meet(lambda: step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, 1)))


def test_a_step_after_a_failed_one_is_right_or_refused_on_every_rank_alike() -> None:
    found = ranks.run(_fail_then_go_on, RANKS)
    assert all(first is not None and first.seconds < PROMPT for first, _ in found)
    seconds = [second for _, second in found]
    assert all(second is None for second in seconds) or all(
        second is not None and second.is_a("PipelineError") and second.seconds < PROMPT for second in seconds
    ), seconds
