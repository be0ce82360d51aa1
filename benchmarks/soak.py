"""A thousand steps of every kind of schedule: memory, file descriptors and threads must not grow.

    python benchmarks/soak.py                                         # 1,000 steps of each schedule, two ranks
    python benchmarks/soak.py --schedules ZBVZeroBubble --steps 10000 --transport c10d

Steps train a small model; every 10th is an evaluation and every 7th has a smaller batch, so nothing is as in the step
before. What a rank has is read after the warm-up, in which each channel's ring of 8,192 messages is used once all
round, and after the steps. Exit status 1 where anything grew: a descriptor, a thread, or memory by more than the
allowed KiB.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZB2P", "ZBVZeroBubble", "DualPipeV")
WIDTH, MICROBATCHES, ROWS = 64, 8, 32


@dataclass(frozen=True)
class Usage:
    """What a process has."""

    memory_kib: int
    descriptors: int
    threads: int

    @staticmethod
    def now() -> Usage:
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return Usage(int(status["VmRSS"].split()[0]), len(os.listdir("/proc/self/fd")), int(status["Threads"]))


class Pipeline:
    """This rank's part of a small model, with its optimizer."""

    def __init__(self, schedule: str) -> None:
        from pp_runtime import PipelineStage, stages_of_rank
        from pp_runtime.schedules import PipelineScheduleMulti, get_schedule_class

        ranks = dist.get_world_size()
        held = stages_of_rank(schedule, dist.get_rank(), ranks)
        count = ranks * len(held)
        modules = {index: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for index in held}
        stages = [PipelineStage(module, index, count, torch.device("cpu")) for index, module in modules.items()]
        kind = get_schedule_class(schedule)
        takes_many = issubclass(kind, PipelineScheduleMulti)
        self._schedule = kind(stages if takes_many else stages[0], MICROBATCHES, loss_fn=nn.functional.mse_loss)
        self._optimizer = torch.optim.AdamW(nn.ModuleList(modules.values()).parameters(), lr=1e-4)
        self._first, self._last = 0 in held, count - 1 in held

    def step(self, number: int) -> None:
        rows = ROWS - 8 if number % 7 == 6 else ROWS
        batch = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(number))
        args = (batch,) if self._first else ()
        if number % 10 == 9:
            self._schedule.eval(*args)
            return
        losses: list[torch.Tensor] | None = [] if self._last else None
        self._schedule.step(*args, target=batch if self._last else None, losses=losses)
        self._optimizer.step()
        self._optimizer.zero_grad()


def soak(schedule: str, warm_up: int, steps: int) -> tuple[Usage, Usage, float]:
    """What this rank has after the warm-up and after the steps, and the seconds of a step."""
    pipeline = Pipeline(schedule)
    for number in range(warm_up):
        pipeline.step(number)
    before, begin = Usage.now(), time.monotonic()
    for number in range(warm_up, warm_up + steps):
        pipeline.step(number)
    return before, Usage.now(), (time.monotonic() - begin) / steps


def work(rank: int, flags: argparse.Namespace, store: str) -> None:
    """One rank: soak every schedule; rank 0 prints, and the exit status is 1 where anything grew."""
    torch.set_num_threads(1)
    os.environ["PP_RUNTIME_TRANSPORT"] = flags.transport
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=flags.ranks)
    if rank == 0:
        print(f"{flags.ranks} ranks, {flags.steps} steps, transport {flags.transport}; growth on the worst rank")
        print(f"{'schedule':<24}{'ms a step':>10}{'memory KiB':>12}{'descriptors':>12}{'threads':>9}", flush=True)
    grew = False
    for schedule in flags.schedules:
        found: list[Any] = [None] * flags.ranks
        dist.all_gather_object(found, soak(schedule, flags.warm_up, flags.steps))
        memory = max(after.memory_kib - before.memory_kib for before, after, _ in found)
        descriptors = max(after.descriptors - before.descriptors for before, after, _ in found)
        threads = max(after.threads - before.threads for before, after, _ in found)
        grew |= memory > flags.allowed_kib or descriptors > 0 or threads > 0
        if rank == 0:
            print(f"{schedule:<24}{found[0][2] * 1e3:>10.2f}{memory:>12}{descriptors:>12}{threads:>9}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if grew:
        raise SystemExit(1)


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="NAME")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=1200, help="steps before those")
    parser.add_argument("--transport", choices=("auto", "shared_memory", "c10d"), default="auto")
    parser.add_argument("--allowed-kib", type=int, default=256, help="of memory that a rank may gain, for noise")
    return parser.parse_args()


def main() -> int:
    options = parse_flags()
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(work, args=(options, f"{folder}/store"), nprocs=options.ranks)
        except mp.ProcessExitedException as exit_of_rank:
            return exit_of_rank.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
