"""Step time with more ranks than cores, ours and torch's.

    python benchmarks/many_ranks.py --ranks 2 4 8 --sizes linear small

Every rank holds stages of the same size, so the work grows with the ranks, and so should a step: by no more than the
ranks, once they share the cores. ``a rank`` is the step divided by the ranks, in units of that with 2 ranks. Ranks are
not pinned, have a thread each, and their steps are timed in a row, as in step_time.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

# First, since it sets what torch reads when it is imported.
from step_time import SIZES, TORCH_SCHEDULES, Batch, Pipeline, medians_of, own_modules  # isort: skip

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank: int, ranks: int, flags: argparse.Namespace, store: str, results: Any) -> None:
    """One rank of a pipeline of every kind."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for size in flags.sizes:
        for schedule in flags.schedules:
            modules, count = own_modules(SIZES[size], schedule, ranks)
            batch = Batch(SIZES[size], flags.microbatches)
            libraries = ("ours", "torch") if schedule in TORCH_SCHEDULES else ("ours",)
            pipelines = [Pipeline(library, schedule, modules, count, batch) for library in libraries]
            times = medians_of(pipelines, flags.turns)
            if rank == 0:
                results.put((size, schedule, times))
            dist.barrier()
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--schedules", nargs="+", default=["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["linear", "small"])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {flags.microbatches} microbatches, steps in milliseconds"
    )
    print(f"{'size':8} {'schedule':22} {'ranks':>5} {'ours':>8} {'a rank':>7} {'torch':>8} {'a rank':>7}")
    few: dict[tuple[str, str], list[float]] = {}
    for ranks in flags.ranks:
        results = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, args=(ranks, flags, f"{folder}/store", results), nprocs=ranks)
        while not results.empty():
            size, schedule, times = results.get()
            first = few.setdefault((size, schedule), [seconds * 2 / ranks for seconds in times])
            columns = [
                f"{seconds * 1e3:8.2f} {seconds / ranks / (unit / 2):7.2f}"
                for seconds, unit in zip(times, first, strict=True)
            ]
            print(f"{size:8} {schedule:22} {ranks:5} {' '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
