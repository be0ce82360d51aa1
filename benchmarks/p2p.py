"""How fast messages go from rank to rank: pp_runtime's channels, torch.distributed.pipelining, gloo and memcpy.

    python benchmarks/p2p.py                                       # 256 B to 8 MiB
    python benchmarks/p2p.py --sizes 256 8388608 --csv p2p.csv --png p2p.png

Two processes, each pinned to a core with one thread. The pipelines are two stages that do nothing (nn.Identity), run
forward only, so a microbatch is one message and what it costs to take and give it; time is that of a step, from the
moment when both ranks stand ready to the moment when both are done, over its microbatches. gloo is a plain isend and
irecv of each message, all posted at once. memcpy is one thread's copy between two buffers of that size. All are run in
turn, and medians of the rounds are shown. All read one and the same source, so none has the cache against it.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

RANKS = 2
SIZES = [256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20]
WAYS = ("shared memory", "c10d", "torch pipeline", "gloo", "memcpy")


@dataclass(frozen=True)
class Row:
    """One way to carry messages of one size."""

    way: str
    bytes: int
    microseconds: float  # a message
    gigabytes_a_second: float


def pipeline_step(way: str, microbatches: int, size: int) -> Callable[[torch.Tensor], None]:
    """A function that runs one forward-only step over the stages of a library, with what carries its messages."""
    if way == "torch pipeline":
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
    else:
        from pp_runtime import PipelineStage, ScheduleGPipe

        os.environ["PP_RUNTIME_TRANSPORT"] = way.replace(" ", "_")
    rank = dist.get_rank()
    group = dist.new_group()  # of its own, so that none can touch another's messages
    stage = PipelineStage(nn.Identity(), rank, RANKS, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, microbatches)

    def step(batch: torch.Tensor) -> None:
        with torch.no_grad():
            schedule.step(*((batch,) if rank == 0 else ()), return_outputs=False)

    step(batch_of(size, microbatches))  # opens what it opens, while the environment names the transport
    return step


def gloo_step(microbatches: int) -> Callable[[torch.Tensor], None]:
    """A function that sends each row of a batch by itself."""
    group, rank = dist.new_group(), dist.get_rank()
    buffers: dict[int, list[torch.Tensor]] = {}

    def step(batch: torch.Tensor) -> None:
        if rank == 0:
            works = [dist.isend(row, 1, group=group) for row in batch]
        else:
            places = buffers.setdefault(batch.shape[1], [torch.empty_like(row) for row in batch])
            works = [dist.irecv(place, 0, group=group) for place in places]
        for work in works:
            work.wait()

    return step


def memcpy_step(microbatches: int) -> Callable[[torch.Tensor], None]:
    """A function that copies the row as often as a step has microbatches; on rank 0 alone."""

    def step(batch: torch.Tensor) -> None:
        if dist.get_rank() == 0:
            target = torch.empty_like(batch[0])
            for row in batch:
                target.copy_(row)

    return step


def batch_of(size: int, microbatches: int) -> torch.Tensor:
    """That many rows of this many bytes, all of them the same memory."""
    return torch.rand(1, size // 4).expand(microbatches, size // 4)


def timed(step: Callable[[torch.Tensor], None], batch: torch.Tensor) -> tuple[float, float]:
    """When this rank began and ended; ranks of one host share the clock."""
    dist.barrier()
    begin = time.monotonic()
    step(batch)
    return begin, time.monotonic()


def measure(size: int, microbatches: int, rounds: int, limit: float) -> list[Row]:
    """Every way with messages of one size; called on every rank. A way gets at most ``limit`` seconds."""
    steps = {way: pipeline_step(way, microbatches, size) for way in WAYS[:3]}
    steps |= {"gloo": gloo_step(microbatches), "memcpy": memcpy_step(microbatches)}
    batch = batch_of(size, microbatches)
    spent = dict.fromkeys(WAYS, 0.0)
    spans: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way in reversed(WAYS) if turn % 2 else WAYS:
            if spent[way] > limit and len(spans[way]) > 2:
                continue
            moments: list[Any] = [None] * RANKS
            dist.all_gather_object(moments, timed(steps[way], batch))
            span = max(end for _, end in moments) - max(begin for begin, _ in moments)
            spent[way] += span
            if turn:
                spans[way].append(span)
    seconds = {way: statistics.median(times) / microbatches for way, times in spans.items()}
    return [Row(way, size, taken * 1e6, size / taken / 1e9) for way, taken in seconds.items()]


def human(size: int) -> str:
    units = ["B", "KiB", "MiB"]
    while size >= 1024 and len(units) > 1:
        size //= 1024
        units.pop(0)
    return f"{size} {units[0]}"


def line(rows: Sequence[Row]) -> str:
    """One size: microseconds of every way, and how ours compares."""
    by_way = {row.way: row for row in rows}
    ours = by_way["shared memory"].microseconds
    cells = "".join(f"{by_way[way].microseconds:>10.2f}{by_way[way].gigabytes_a_second:>8.2f}" for way in WAYS)
    torch_over, of_memcpy = by_way["torch pipeline"].microseconds / ours, by_way["memcpy"].microseconds / ours
    return f"{human(rows[0].bytes):>8}{cells}{torch_over:>12.1f}{of_memcpy:>12.2f}"


def work(rank: int, flags: argparse.Namespace, store: str) -> None:
    """One rank: measure every size, print on rank 0."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    rows = []
    if rank == 0:
        print(f"{RANKS} ranks on {len(cores)} cores, {flags.microbatches} microbatches, torch {torch.__version__}")
        print(f"{'':>8}" + "".join(f"{way:>18}" for way in WAYS) + f"{'torch/ours':>12}{'of memcpy':>12}")
        print(f"{'message':>8}" + f"{'us':>10}{'GB/s':>8}" * len(WAYS) + f"{'(times)':>12}{'(speed)':>12}", flush=True)
    for size in flags.sizes:
        # As many as always, but no more memory than torch's buffers for 256 MiB.
        microbatches = max(8, min(flags.microbatches, (256 << 20) // size))
        rows += (found := measure(size, microbatches, flags.rounds, flags.limit))
        if rank == 0:
            print(line(found), flush=True)
    if rank == 0 and flags.csv:
        with flags.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(Row)])
            writer.writerows(map(astuple, rows))
    if rank == 0 and flags.png:
        save_png(rows, flags.png)
    dist.barrier()
    dist.destroy_process_group()


def save_png(rows: Sequence[Row], path: Path) -> None:
    """Microseconds a message and gigabytes a second against the size, a line a way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for way in WAYS:
        of_way = [row for row in rows if row.way == way]
        sizes = [row.bytes for row in of_way]
        style = {"marker": "o", "label": way, "linestyle": "--" if way == "memcpy" else "-"}
        panels[0].plot(sizes, [row.microseconds for row in of_way], **style)
        panels[1].plot(sizes, [row.gigabytes_a_second for row in of_way], **style)
    for panel, title in zip(panels, ("microseconds a message", "GB/s"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("bytes a message")
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument("--microbatches", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each way")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds that a way may take for one size")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(parse_flags(), f"{folder}/store"), nprocs=RANKS)
