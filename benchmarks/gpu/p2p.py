"""How fast messages go from a rank's device to another's: ours, torch's, and a copy on one device.

Two stages that do nothing (nn.Identity), run forward only, so a microbatch is one message; time is that of a step, from
the moment when both ranks stand ready to the moment when both devices are done, over its microbatches. Medians.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu import devices, records
from benchmarks.gpu.host_staging import stage_through_the_host
from benchmarks.gpu.pipelines import OURS_ALONE, libraries, torch_goes_over
from tests.helpers import device_cases

RANKS = 2
_EACH = 30.0
_TURNS = 7
_MOST = 256 << 20  # bytes of a batch


def main(kind: str) -> None:
    """Size after size."""
    records.note(torch_goes_over(kind, RANKS))
    sizes = [1 << 10, 64 << 10] if kind == "sim" else [1 << 10, 64 << 10, 1 << 20, 8 << 20, 32 << 20]
    devices.run_items(measure, RANKS, kind, [str(size) for size in sizes], _EACH, OURS_ALONE)


def measure(rank: int, kind: str, item: str) -> None:
    """All ways with messages of one size; called on every rank."""
    size, device = int(item.removesuffix(OURS_ALONE)), device_cases.own_device(kind, rank)
    microbatches = max(8, min(16 if kind == "sim" else 128, _MOST // size))
    batch = torch.rand(microbatches, size // 4, device=device)
    ways = {
        name: _pipeline_step(name, kind, rank, device, microbatches) for name in libraries(kind, RANKS, "GPipe", item)
    }
    ways["a copy on the device"] = _copies(rank)
    spans: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_TURNS + 1):
        for name in reversed(ways) if turn % 2 else ways:
            dist.barrier()
            begin = time.monotonic()
            ways[name](batch)
            device_cases.synchronize(device)
            ends = devices.gathered((begin, time.monotonic()))
            if turn:
                spans[name].append(max(end for _, end in ends) - max(begin for begin, _ in ends))
    if rank == 0:
        row = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
        for name, times in spans.items():
            taken = statistics.median(times) / microbatches
            records.number("Messages between 2 ranks; medians", row, name, taken * 1e6, "us")
            records.number("Messages between 2 ranks; medians", row, f"{name}, speed", size / taken / 1e9, "GB/s")
    del ways
    gc.collect()


def _pipeline_step(
    library: str, kind: str, rank: int, device: torch.device, microbatches: int
) -> Callable[[torch.Tensor], None]:
    if library == "torch":
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        if not devices.nccl_serves(kind, RANKS):
            stage_through_the_host()
    else:
        from pp_runtime import PipelineStage, ScheduleGPipe  # type: ignore[assignment]
    made: Any = ScheduleGPipe(PipelineStage(nn.Identity(), rank, RANKS, device, group=dist.new_group()), microbatches)

    def step(batch: torch.Tensor) -> None:
        os.environ["PP_RUNTIME_TRANSPORT"] = "c10d" if library == "ours, NCCL" else "auto"
        with torch.no_grad():
            made.step(*((batch,) if rank == 0 else ()), return_outputs=False)

    return step


def _copies(rank: int) -> Callable[[torch.Tensor], None]:
    def step(batch: torch.Tensor) -> None:
        if rank == 0:
            target = torch.empty_like(batch[0])
            for row in batch:
                target.copy_(row)

    return step
