"""What a step's checks cost beside the step, for the smallest stages of step_time.py.

    python benchmarks/checks.py

Counted are the looks at the arguments of ``step`` and the reading of every received message's description, which is
checked number by number: on the rank of the last stage, which has the most to check. A description's reading is timed
with the making of a text of it, which a step does not do. The heartbeat, two words and a time an action, is too short
to be timed from here: each action of the step is counted as 50 ns. The step is timed in a row of others, two ranks on
a core each, as in step_time.py.
"""

from __future__ import annotations

import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from typing import Any

# First, since it sets what torch reads when it is imported.
from step_time import RANKS, SIZES, Batch, Pipeline, join, medians_of, own_modules  # isort: skip

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SCHEDULES, MICROBATCHES, HEARTBEAT = ("GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"), 8, 50e-9


def median_time(call: Callable[[], Any], repeats: int = 1000) -> float:
    """Seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def description(shape: tuple[int, ...]) -> bytes:
    """Of a message with one float tensor, as csrc/transport/message.cpp writes it."""
    return (
        struct.pack("<QIIIII4x", 1, 0, 1, 1, 0, 0)
        + struct.pack("<5B", 1, 0, 6, len(shape), 0)
        + struct.pack(f"<{len(shape)}q", *shape)
    )


def checks(schedule: Any, batch: Batch) -> float:
    """Seconds that the checks of a step take on the last stage's rank."""
    from pp_runtime import _C

    args, kwargs = [()] * MICROBATCHES, [{}] * MICROBATCHES
    targets, losses = list(batch.y.tensor_split(MICROBATCHES)), list[torch.Tensor]()

    def arguments() -> None:
        schedule._check_mode(batch.y, None)
        schedule._check_loss_inputs(targets, losses)
        schedule._check_inputs(args, kwargs, targets, losses)
        schedule._check_inputs(args, kwargs, targets, losses)

    own = schedule.pipeline_order_with_comms[dist.get_rank()]
    received = sum(action.computation_type.value.startswith("RECV") for action in own)
    said = description(SIZES["linear"].microbatch)
    reading = median_time(lambda: _C.describe_message(said))
    return median_time(arguments) + received * reading + len(own) * HEARTBEAT


def work(rank: int, store: str) -> None:
    """One rank: a line for each schedule."""
    join(rank, store)
    for name in SCHEDULES:
        modules, count = own_modules(SIZES["linear"], name, RANKS)
        batch = Batch(SIZES["linear"], MICROBATCHES)
        pipeline = Pipeline("ours", name, modules, count, batch)
        (step,) = medians_of([pipeline], 50)
        if count - 1 in modules:
            taken = checks(pipeline._schedule, batch)
            print(f"{name:16} step {step * 1e6:5.0f} us, checks {taken * 1e6:4.1f} us: {taken / step:.1%}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(f"{folder}/store",), nprocs=RANKS)
