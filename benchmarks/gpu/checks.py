"""Whether training on the device gives the plain model's numbers: every schedule, ranks that share a GPU included."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from benchmarks.gpu import devices, records
from tests.helpers import device_cases
from tests.helpers.pipelines import EVERY_SCHEDULE, stages_allowed

_EACH = 40.0  # seconds; a check takes less than one
_BUSY = 2_000_000  # cycles of a forward, so that hosts are far ahead of their devices


def main(kind: str, size: str, what: str = "every") -> None:
    """Schedules on so many ranks, through device channels; ``what`` says whether on an idle and on a busy device."""
    count = int(size)
    if count == 1:
        _check(["Interleaved1F1B", "ZBVZeroBubble"], 1, kind, transport="auto")
        return
    gpus = devices.count(kind)
    records.note(f"{count} ranks on {min(gpus, count)} device{'s' * (gpus > 1)}, through device channels")
    names = ["1F1B", "InterleavedZeroBubble", "DualPipeV"] if what == "few" else list(EVERY_SCHEDULE)
    if count == 2 and what == "every":
        devices.run_items(_check_ahead, 2, kind, ["the host runs ahead of the device"], _EACH)
    _check([*names, *(f"{name}, busy" for name in names if count == 2)], count, kind, transport="device")


def _check(items: list[str], count: int, kind: str, **options: Any) -> None:
    devices.run_items(check, count, kind, items, _EACH, **options)


def check(rank: int, kind: str, item: str, **options: Any) -> None:
    """Train with the schedule that the item names; rank 0 records what differs on any rank."""
    schedule, _, busy = item.partition(", ")
    count = dist.get_world_size()
    stages = 2 if count == 1 else stages_allowed(schedule)[-1]
    begin = time.monotonic()
    cycles = _BUSY if busy == "busy" else 0
    found = device_cases.train(rank, kind, count, schedule, stages_per_rank=stages, cycles=cycles, **options)
    record_of_all(rank, item, found, begin)


def _check_ahead(rank: int, kind: str, item: str) -> None:
    begin = time.monotonic()
    record_of_all(rank, item, device_cases.not_ahead(*device_cases.run_ahead(rank, kind, "device")), begin)


def record_of_all(rank: int, item: str, found: list[str], begin: float) -> None:
    """Record what any rank found, once."""
    everyones = devices.gathered(found)
    if rank == 0:
        lines = [f"rank {other}: {line}" for other, theirs in enumerate(everyones) for line in theirs]
        records.check(item, lines, time.monotonic() - begin)
