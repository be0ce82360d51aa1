"""Training on an accelerator beside the plain model on the same device; needs no pytest, so a bare GPU machine can too.

``kind`` is "cuda", or "sim" for the asynchronous device. Ranks of a host share its GPUs in turn.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.helpers import api, reference
from tests.helpers.pipelines import backward_orders, held_by, make_schedule, placement, step

BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "sim": "cpu:gloo,sim:simccl"}
WIDTH = 64
_CYCLES_A_MICROSECOND = 1500  # of a GPU, about


def before_groups(kind: str) -> Callable[[], Any] | None:
    """What a rank calls before it has a process group."""
    if kind != "sim":
        return None
    from tests.async_device import device

    return device.load


def own_device(kind: str, rank: int) -> torch.device:
    """The device of a rank, which becomes the current one."""
    if kind == "sim":
        return torch.device("sim", 0)
    device = torch.device(kind, rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def synchronize(device: torch.device) -> None:
    """Wait for the device; torch.accelerator's function does nothing for one whose start torch has not seen."""
    torch.get_device_module(device).synchronize(device)


def keep_busy(device: torch.device, cycles: int) -> None:
    """Give the device work for so many of a GPU's cycles, without the host."""
    if device.type == "cuda":
        torch.cuda._sleep(cycles)
    elif cycles:
        before_groups("sim")().queue_sleep(cycles // _CYCLES_A_MICROSECOND)


class Slow(nn.Module):
    """Keeps the device busy without the host, and keeps what it received."""

    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.linear, self.cycles = nn.Linear(WIDTH, WIDTH), cycles
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append((x.detach(), x.detach().clone()))
        keep_busy(x.device, self.cycles)
        return self.linear(x).relu()


def train(
    rank: int,
    kind: str,
    count: int,
    schedule: str,
    stages_per_rank: int = 1,
    cycles: int = 0,
    transport: str = "auto",
    communicators: str = "auto",
) -> list[str]:
    """Three steps beside the plain model on the same device; what differs."""
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    os.environ["PP_RUNTIME_COMMUNICATORS"] = communicators
    device = own_device(kind, rank)
    torch.manual_seed(0)
    num_stages, microbatches = len(placement(schedule, count, stages_per_rank)), 2 * count + 1
    plain = [Slow(0) for _ in range(num_stages)]
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


def run_ahead(rank: int, kind: str, transport: str = "auto") -> tuple[float, float, float]:
    """Seconds until a step returns, until the device is done, and of the compute in the timeline; of two ranks."""
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    device = own_device(kind, rank)
    stage = api.PipelineStage(Slow(50_000_000).to(device), rank, 2, device)
    pipeline = make_schedule("1F1B", [stage], 4, nn.functional.mse_loss)
    batch = reference.Batch((torch.randn(8, WIDTH, device=device),), torch.randn(8, WIDTH, device=device))
    step(pipeline, [stage], batch)
    synchronize(device)
    begun = time.monotonic()
    step(pipeline, [stage], batch)
    returned = time.monotonic() - begun
    synchronize(device)
    done = time.monotonic() - begun
    pipeline.record_timeline = True
    step(pipeline, [stage], batch)
    return returned, done, pipeline.timeline().busy(rank)


def not_ahead(returned: float, done: float, busy: float) -> list[str]:
    """What is wrong with what ``run_ahead`` found: how far a host runs ahead is bounded by the slots."""
    found = []
    if returned >= 0.9 * done:
        found.append(f"the host waited for the device: {returned:.4f} of {done:.4f} s")
    if not done / 3 < busy < 1.5 * done:
        found.append(f"the timeline is not the device's: busy for {busy:.4f} of {done:.4f} s")
    return found
