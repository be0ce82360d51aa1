"""Peak memory of a step on the device, ours and torch's: of tensors, and what the device holds beside them.

Above what a rank has before: its modules and its batch. Beside tensors are device channels, communicators and the
kernels that a library loads; where ranks share a device that is the sum of all. The fullest rank.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist

from benchmarks.gpu import devices, records
from benchmarks.gpu.pipelines import (
    OURS_ALONE,
    SCHEDULES,
    SIZES,
    Pipeline,
    Size,
    libraries,
    own_modules,
    torch_goes_over,
)
from benchmarks.gpu.step_time import RANKS
from tests.helpers import device_cases

_MICROBATCHES = 8
_EACH = 30.0


def main(kind: str) -> None:
    """Every schedule, after one that is not shown: what a library takes once is not a schedule's."""
    records.note(torch_goes_over(kind, RANKS))
    schedules = ["1F1B", "ZBVZeroBubble"] if kind == "sim" else SCHEDULES
    items = ["GPipe, not shown", *schedules]
    devices.run_items(measure, RANKS, kind, items, _EACH, OURS_ALONE, name="tiny" if kind == "sim" else "large")


def measure(rank: int, kind: str, item: str, name: str) -> None:
    """One line of the table; called on every rank."""
    schedule, _, hidden = item.removesuffix(OURS_ALONE).partition(", ")
    size, device = SIZES[name], device_cases.own_device(kind, rank)
    table = f"Peak memory of a step, {RANKS} ranks, {_MICROBATCHES} microbatches, stages of {size.title}"
    for library in libraries(kind, RANKS, schedule, item):
        peak, beside = _measure(library, kind, schedule, rank, device, size)
        mib = 1 << 20
        if rank == 0 and not hidden:
            records.number(table, schedule, library, peak / mib, "MiB")
            if beside is not None:
                records.number(table, schedule, f"{library}, beside tensors", beside / mib, "MiB")


def _measure(
    library: str, kind: str, schedule: str, rank: int, device: torch.device, size: Size
) -> tuple[int, int | None]:
    modules, num_stages = own_modules(size, schedule, rank, device)
    for module in modules.values():
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)  # part of a model, not of a step
    pipeline = Pipeline(library, kind, schedule, modules, num_stages, size, _MICROBATCHES)
    gc.collect()
    before, outside = _settled(device)
    for _ in range(2):
        pipeline.step()
    device_cases.synchronize(device)
    peak = devices.memory_in_use(device)[1] - before
    _, outside_after = _settled(device)
    peaks = devices.gathered(peak)
    del pipeline, modules
    gc.collect()
    dist.barrier()  # a schedule that goes takes its channels with it
    return max(peaks), None if outside is None else outside_after - outside


def _settled(device: torch.device) -> tuple[int, int | None]:
    """Bytes of tensors now, and of the device that no rank's tensors hold, while all ranks stand still."""
    device_cases.synchronize(device)
    now, _ = devices.memory_in_use(device, forget=True)
    if device.type != "cuda":
        dist.barrier()
        return now, None
    torch.cuda.empty_cache()
    dist.barrier()
    free, whole = torch.cuda.mem_get_info(device)
    same_device = devices.gathered((device.index, torch.cuda.memory_reserved(device)))
    reserved = sum(bytes_ for index, bytes_ in same_device if index == device.index)
    dist.barrier()
    return now, whole - free - reserved
