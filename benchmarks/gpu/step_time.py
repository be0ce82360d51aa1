"""Step time beside torch's and beside each schedule's bound, and the hosts' processor time of a step.

The libraries run in the same processes on the same modules and alternate. A turn is an untimed step and some timed
ones, one after the other; it begins when all ranks stand ready and ends when the last device is done.

The bound is the makespan of the schedule's order at the times that its actions take alone, one rank at a time; where
ranks share a device, the sum of all their actions if that is more: then nothing idles and nothing overlaps.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from benchmarks.gpu import devices, records
from benchmarks.gpu.pipelines import OURS_ALONE, SCHEDULES, SIZES, Pipeline, libraries, own_modules, torch_goes_over
from benchmarks.gpu.stages_on_device import StagesOnDevice
from pp_runtime.orders.catalogue import build_order
from pp_runtime.orders.ir import leaves
from pp_runtime.timing import Costs, simulate
from tests.helpers import device_cases

RANKS = 2
_MICROBATCHES = 8
_STEPS = 3  # timed ones of a turn
_LEAST_TURNS = 3
_EACH = 45.0  # seconds after which an item is given up
_HOST_BOUND = ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"]


@dataclass
class Turns:
    """One library's turns on one rank, in seconds."""

    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    hosts: list[float] = field(default_factory=list)


def main(kind: str) -> None:
    """Every schedule with stages that keep the device busy, some with stages that only keep the host busy."""
    records.note(torch_goes_over(kind, RANKS))
    records.note(
        "the bound is for devices of their own" if _own_devices(kind) else "the bound is for one shared device"
    )
    if kind == "sim":
        items, seconds = ["1F1B, tiny", "ZBVZeroBubble, tiny"], 1.0
    else:
        items = [f"{name}, large" for name in SCHEDULES] + [f"{name}, linear" for name in _HOST_BOUND]
        seconds = 6.0
    devices.run_items(measure, RANKS, kind, items, _EACH, OURS_ALONE, seconds=seconds)


def measure(rank: int, kind: str, item: str, seconds: float) -> None:
    """One line of the table, within about so many seconds; called on every rank."""
    schedule, name = item.removesuffix(OURS_ALONE).split(", ")
    size, device = SIZES[name], device_cases.own_device(kind, rank)
    torch.manual_seed(rank)
    modules, num_stages = own_modules(size, schedule, rank, device)
    order, placement = build_order(schedule, RANKS, num_stages, _MICROBATCHES)
    alone = StagesOnDevice(modules, num_stages - 1, size.microbatch, leaves(order[rank]), device, size.dtype)
    names = libraries(kind, RANKS, schedule, item)
    pipelines = [Pipeline(one, kind, schedule, modules, num_stages, size, _MICROBATCHES) for one in names]
    for pipeline in pipelines:
        for _ in range(2):
            pipeline.step()
        device_cases.synchronize(device)
    _in_turn(rank, alone)
    alone.forget()
    turns = [Turns() for _ in names]
    begin = time.monotonic()
    number = 0
    while number < _LEAST_TURNS or _agreed(time.monotonic() - begin < seconds):
        for place in reversed(range(len(names))) if number % 2 else range(len(names)):
            _turn(pipelines[place], turns[place], device)
        _in_turn(rank, alone)
        number += 1
    everyones = devices.gathered((turns, alone.times(), alone.work()))
    if rank == 0:
        times = {i: found for _, theirs, _ in everyones for i, found in theirs.items()}
        costs = Costs.from_mapping({kind: [times[i][kind] for i in range(num_stages)] for kind in "FIWB"})
        # A pair of actions that may overlap is one after the other, as both libraries run it.
        least = simulate({one: list(leaves(own)) for one, own in order.items()}, costs, placement=placement).makespan
        if not _own_devices(kind):
            least = max(least, sum(work for _, _, work in everyones))
        table = f"Step time, {RANKS} ranks, {_MICROBATCHES} microbatches, stages of {size.title}; medians"
        _record(table, schedule, names, [[theirs[i] for theirs, _, _ in everyones] for i in range(len(names))], least)
    del pipelines, alone, modules
    gc.collect()


def _turn(pipeline: Pipeline, turns: Turns, device: torch.device) -> None:
    dist.barrier()
    pipeline.step()
    device_cases.synchronize(device)
    dist.barrier()
    took = time.process_time()
    turns.begins.append(time.monotonic())
    for _ in range(_STEPS):
        pipeline.step()
    turns.hosts.append((time.process_time() - took) / _STEPS)
    device_cases.synchronize(device)
    turns.ends.append(time.monotonic())


def _in_turn(rank: int, alone: StagesOnDevice) -> None:
    """Each rank while the others stand still: a shared device would show them in each other's times."""
    for other in range(RANKS):
        dist.barrier()
        if other == rank:
            alone.sample()
    dist.barrier()


def _record(table: str, schedule: str, names: Sequence[str], found: Sequence[Sequence[Turns]], least: float) -> None:
    records.number(table, schedule, "bound", least * 1e3, "ms")
    steps = {}
    for name, of_ranks in zip(names, found, strict=True):
        turns = range(len(of_ranks[0].ends))
        spans = [max(one.ends[i] for one in of_ranks) - min(one.begins[i] for one in of_ranks) for i in turns]
        steps[name] = statistics.median(spans) / _STEPS
        records.number(table, schedule, name, steps[name] * 1e3, "ms")
    for name, step in steps.items():
        records.number(table, schedule, f"bound / {name}", least / step, "")
    for name, of_ranks in zip(names, found, strict=True):
        host = statistics.mean(statistics.median(one.hosts) for one in of_ranks)
        records.number(table, schedule, f"host, {name}", host * 1e3, "ms")
    if "torch" in steps:
        records.number(table, schedule, "torch / ours", steps["torch"] / steps["ours"], "")


def _own_devices(kind: str) -> bool:
    return devices.count(kind) >= RANKS


def _agreed(wanted: bool) -> bool:
    """What rank 0 wants."""
    return devices.gathered(wanted)[0]
