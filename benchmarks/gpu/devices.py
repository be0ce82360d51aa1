"""What a step asks of its device: a GPU, or the asynchronous device in a dry run."""

from __future__ import annotations

import faulthandler
import itertools
import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import records
from tests.helpers import device_cases, ranks

_START = "PP_TEST_START"  # of tests/helpers/ranks.py
_FORKED = "in forked subprocess"  # torch: Cannot re-initialize CUDA in forked subprocess

_meetings = itertools.count()  # of this process, which has one process group


def load(kind: str) -> torch.device:
    """The device of a step that has one process."""
    prepare = device_cases.before_groups(kind)
    if prepare is not None:
        prepare()
    return device_cases.own_device(kind, 0)


def count(kind: str) -> int:
    """How many devices there are. In a dry run one, as on most machines that are lent."""
    return torch.cuda.device_count() if kind == "cuda" else 1


def nccl_serves(kind: str, size: int) -> bool:
    """Whether each of so many ranks has a GPU of its own, which NCCL asks for."""
    return kind == "cuda" and count(kind) >= size


def gathered(value: Any) -> list[Any]:
    """Every rank's value, on every rank: through the store, as torch's own way needs numpy."""
    store = dist.distributed_c10d._get_default_store()
    meeting = next(_meetings)
    store.set(f"gathered/{meeting}/{dist.get_rank()}", pickle.dumps(value))
    return [pickle.loads(store.get(f"gathered/{meeting}/{other}")) for other in range(dist.get_world_size())]


def memory_in_use(device: torch.device, forget: bool = False) -> tuple[int, int]:
    """Bytes of tensors now and at the most since the last time that it was asked to forget."""
    if device.type == "sim":
        return device_cases.before_groups("sim")().memory_in_use(forget=forget)
    found = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if forget:
        torch.cuda.reset_peak_memory_stats(device)
    return found


def run_items(
    work: Callable[..., None], size: int, kind: str, items: list[str], each: float, again: str = "", **options: Any
) -> None:
    """Call ``work(rank, kind, item, **options)`` for all items, one after the other, on ranks that stay.

    Where an item raises, or takes longer than ``each`` seconds, it is recorded as wrong, and new ranks go on with the
    items after it; with ``again``, after one more try whose item ends in that.
    """
    left = list(items)
    path = os.environ.get(records.FILE)
    while left:
        begin = time.monotonic()
        group: dict[str, Any] = {"backend": device_cases.BACKENDS[kind], "prepare": device_cases.before_groups(kind)}
        try:
            ranks.run(_go_through, size, 60 + each * len(left), **group, call=(work, kind, left, each, path, options))
            return
        except ranks.RanksFailed as error:
            if _FORKED in str(error) and _START not in os.environ:
                os.environ[_START] = "spawn"
                records.note("ranks are new interpreters: an import had begun to use CUDA before they were forked")
                continue
            known = records.read(Path(path)) if path else []
            past = {record["item"] for record in known if record["kind"] == "done"}
            failed = next((item for item in left if item not in past), left[-1])
            print(f"{failed} failed:\n{error}", flush=True)
            records.check(failed, _summary(str(error)), time.monotonic() - begin)
            left = left[left.index(failed) + 1 :]
            if again and not failed.endswith(again):
                left.insert(0, failed + again)


def _summary(text: str) -> list[str]:
    """What was raised where a rank says so, or how it began."""
    lines = [line for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed)\b", line)]
    return [lines[0], *(raised or lines[1:])[:4]]


def _go_through(rank: int, call: tuple[Callable[..., None], str, list[str], float, str | None, dict[str, Any]]) -> None:
    work, kind, items, each, path, options = call
    if path is not None:
        os.environ[records.FILE] = path  # the server that ranks are forked from may be older
    for item in items:
        faulthandler.dump_traceback_later(each, exit=True)  # a rank that hangs says where, and ends
        work(rank, kind, item, **options)
        dist.barrier()
        faulthandler.cancel_dump_traceback_later()
        if rank == 0:
            records.done(item)
