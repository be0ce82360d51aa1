"""On GPUs: training equals the plain model's, kept inputs stay, and the host runs ahead of the device."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import api, ranks, reference
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    backward_orders,
    held_by,
    make_schedule,
    placement,
    stages_allowed,
    step,
)

pytestmark = [pytest.mark.cuda, api.ours_only("is not what is tested here")]
one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
BACKEND = "cpu:gloo,cuda:nccl"
WIDTH = 64


class _Slow(nn.Module):
    """Keeps the device busy without the host, and keeps what it received."""

    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.linear, self.cycles = nn.Linear(WIDTH, WIDTH), cycles
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append((x.detach(), x.detach().clone()))
        torch.cuda._sleep(self.cycles)
        return self.linear(x).relu()


def _train(
    rank: int, count: int, schedule: str, stages_per_rank: int = 1, communicators: str = "edge", cycles: int = 0
) -> list[str]:
    """Three steps beside the plain model on the same device; what differs."""
    os.environ["PP_RUNTIME_COMMUNICATORS"] = communicators
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    num_stages, microbatches = len(placement(schedule, count, stages_per_rank)), 2 * count + 1
    plain = [_Slow(0) for _ in range(num_stages)]
    mine = {index: copy.deepcopy(plain[index]).to(device) for index in held_by(rank, schedule, count, stages_per_rank)}
    for module in plain:
        module.to(device)
    for module in mine.values():
        module.cycles = cycles
    stages = [api.PipelineStage(module, index, num_stages, device) for index, module in mine.items()]
    pipeline = make_schedule(schedule, stages, microbatches, nn.functional.mse_loss)
    found = []
    for number in range(3):
        torch.manual_seed(number)
        x, y = torch.randn(2, 4 * microbatches, WIDTH).to(device)
        batch = reference.Batch((x,), y)
        expected = reference.train_step(plain, batch, nn.functional.mse_loss, microbatches, backward_orders(pipeline))
        for module in mine.values():
            module.zero_grad()
        got = step(pipeline, stages, batch)
        if num_stages - 1 in mine:
            found += reference.differences(f"step {number} losses", got.losses, expected.losses, exact=False)
        for index, module in mine.items():
            for (name, parameter), theirs in zip(module.named_parameters(), plain[index].parameters(), strict=True):
                where = f"step {number}, stage {index}, {name}.grad"
                found += reference.differences(where, parameter.grad, theirs.grad, exact=False)
    for index, module in mine.items():
        changed = [place for place, (kept, copied) in enumerate(module.kept) if not torch.equal(kept, copied)]
        found += [f"stage {index}: input {place} changed" for place in changed]
    return found


@one_gpu
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_stages_of_one_gpu_equal_the_plain_model(schedule: str) -> None:
    assert ranks.run(_train, 1, backend=BACKEND, count=1, schedule=schedule, stages_per_rank=2) == [[]]


@two_gpus
@pytest.mark.parametrize("cycles", [0, 2_000_000])
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_two_gpus_equal_the_plain_model(schedule: str, cycles: int) -> None:
    options: dict[str, Any] = {"schedule": schedule, "stages_per_rank": stages_allowed(schedule)[-1], "cycles": cycles}
    assert ranks.run(_train, 2, timeout=120, backend=BACKEND, count=2, **options) == [[], []]


@two_gpus
@pytest.mark.parametrize("communicators", ["direction", "shared"])
def test_fewer_communicators_serve_schedules_that_allow_it(communicators: str) -> None:
    options: dict[str, Any] = {"schedule": "GPipe", "communicators": communicators}
    assert ranks.run(_train, 2, timeout=120, backend=BACKEND, count=2, **options) == [[], []]


def _run_ahead(rank: int) -> tuple[float, float, float]:
    """Seconds until a step returns, until the device is done, and of the compute in the timeline."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    stage = api.PipelineStage(_Slow(50_000_000).to(device), rank, 2, device)
    pipeline = make_schedule("1F1B", [stage], 4, nn.functional.mse_loss)
    batch = reference.Batch((torch.randn(8, WIDTH, device=device),), torch.randn(8, WIDTH, device=device))
    step(pipeline, [stage], batch)
    torch.cuda.synchronize()
    begun = time.monotonic()
    step(pipeline, [stage], batch)
    returned = time.monotonic() - begun
    torch.cuda.synchronize()
    done = time.monotonic() - begun
    pipeline.record_timeline = True
    step(pipeline, [stage], batch)
    return returned, done, pipeline.timeline().busy(rank)


@two_gpus
def test_the_host_does_not_wait_for_the_device_and_the_timeline_is_the_devices() -> None:
    for returned, done, busy in ranks.run(_run_ahead, 2, timeout=120, backend=BACKEND):
        assert returned < 0.9 * done  # how far it runs ahead is bounded by the slots
        assert done / 3 < busy < 1.5 * done
