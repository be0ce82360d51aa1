"""Peak memory of a step against its number of microbatches: pp_runtime's beside torch.distributed.pipelining's.

    python benchmarks/memory.py                                    # every schedule, two ranks
    python benchmarks/memory.py --schedules GPipe 1F1B --csv memory.csv --png memory.png

Each stage adds one number to its input, so autograd keeps nothing and what grows is the pipeline's own: buffers,
messages, outputs. The batch is one row seen as many, so it takes no memory either. Peak is the kernel's high-water mark
of the process (VmHWM, reset before), with every activation in pages of its own. Growth is the slope of the peak over
the number of microbatches, in activations a microbatch, on the rank where it is largest.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

TORCH_SCHEDULES = (
    "GPipe",
    "1F1B",
    "LoopedBFS",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)
OUR_SCHEDULES = ("ZB1P", "ZB2P", "VHalf", "VMin")
_MMAP_THRESHOLD = -3  # of mallopt(3)


@dataclass(frozen=True)
class Peak:
    """The peak of one setting, in activations above what the process took before, on the rank that took most."""

    library: str
    schedule: str
    microbatches: int
    activations: float
    growth: float  # of all the settings of this library and schedule, on the rank where it is largest


class KeepsNothing(nn.Module):
    """A stage whose backward needs nothing of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class Total:
    """A loss that keeps nothing of its own either: weights that all microbatches share."""

    def __init__(self, width: int) -> None:
        self.weights = torch.ones(1, width)

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * self.weights).sum()


def peak_bytes() -> int:
    """The most memory that this process had in use since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> int:
    """Start the high-water mark anew; what is in use now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def pages_of_their_own(least: int = 65536) -> None:
    """Let malloc take every block of at least this size from the kernel and give it back at once."""
    if ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, least) != 1:
        raise RuntimeError("mallopt refused the threshold")


def peak_of_step(library: str, schedule: str, microbatches: int, width: int, steps: int = 2) -> int:
    """The bytes that a new pipeline and its steps took at most, on this rank."""
    if library == "ours":
        from pp_runtime import PipelineStage
        from pp_runtime.schedules import PipelineScheduleMulti, get_schedule_class
    else:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
    from pp_runtime import stages_of_rank

    ranks = dist.get_world_size()
    held = stages_of_rank(schedule, dist.get_rank(), ranks)
    count = ranks * len(held)
    x = torch.zeros(1, width).expand(microbatches, width)
    target = torch.zeros(microbatches, 1)
    before = forget_peak()
    stages = [PipelineStage(KeepsNothing(), index, count, torch.device("cpu")) for index in held]
    schedule_class = get_schedule_class(schedule)
    takes_many = issubclass(schedule_class, PipelineScheduleMulti)
    pipeline = schedule_class(stages if takes_many else stages[0], microbatches, loss_fn=Total(width))
    args, last = (x,) if 0 in held else (), count - 1 in held
    for _ in range(steps):
        losses: list[torch.Tensor] | None = [] if last else None
        pipeline.step(*args, target=target if last else None, losses=losses, return_outputs=False)
    taken = peak_bytes() - before
    dist.barrier()  # a schedule that goes takes its channels with it
    return taken


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line through the points, by least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def measure(library: str, schedule: str, counts: Sequence[int], width: int) -> list[Peak]:
    """The peaks of one schedule, one for each number of microbatches. Called on every rank."""
    peak_of_step(library, schedule, min(counts), width)  # what a library takes once is not counted
    mine = [peak_of_step(library, schedule, count, width) / (4 * width) for count in counts]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    growth = max(slope(counts, theirs) for theirs in everyones)
    return [
        Peak(library, schedule, count, max(theirs[i] for theirs in everyones), growth) for i, count in enumerate(counts)
    ]


def work(rank: int, flags: argparse.Namespace, store: str) -> None:
    """One rank: measure everything, print on rank 0."""
    torch.set_num_threads(1)
    pages_of_their_own()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=flags.ranks)
    width = flags.kib * 1024 // 4
    if rank == 0:
        counts = ", ".join(map(str, flags.microbatches))
        print(f"{flags.ranks} ranks, stages that keep nothing, {flags.kib} KiB a microbatch, torch {torch.__version__}")
        print(f"peak of {counts} microbatches, in activations, on the fullest rank; growth a microbatch")
        print(f"{'schedule':<24}{'ours':>28}{'growth':>10}{'torch':>28}{'growth':>10}", flush=True)
    peaks: list[Peak] = []
    for schedule in flags.schedules:
        cells = f"{schedule:<24}"
        for library in ["ours", "torch"] if schedule in TORCH_SCHEDULES else ["ours"]:
            found = measure(library, schedule, flags.microbatches, width)
            peaks += found
            cells += f"{' '.join(f'{peak.activations:.1f}' for peak in found):>28}{found[0].growth:>10.3f}"
        if rank == 0:
            print(cells, flush=True)
    if rank == 0 and flags.csv:
        write_csv(peaks, flags.csv)
    if rank == 0 and flags.png:
        save_png(peaks, flags.png)
    dist.barrier()
    dist.destroy_process_group()


def write_csv(peaks: Sequence[Peak], path: Path) -> None:
    """A row a measurement."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Peak)])
        writer.writerows(map(astuple, peaks))


def save_png(peaks: Sequence[Peak], path: Path) -> None:
    """A panel a schedule, a line a library."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    schedules = list(dict.fromkeys(peak.schedule for peak in peaks))
    columns = min(4, len(schedules))
    rows = -(-len(schedules) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), squeeze=False, sharex=True)
    for place, axis in enumerate(axes.flat):
        axis.set_visible(place < len(schedules))
        for library, colour in (("ours", "tab:blue"), ("torch", "tab:orange")) if place < len(schedules) else ():
            points = [peak for peak in peaks if (peak.schedule, peak.library) == (schedules[place], library)]
            if points:
                label = f"{library}: {points[0].growth:+.2f} a microbatch"
                xs, ys = [peak.microbatches for peak in points], [peak.activations for peak in points]
                axis.plot(xs, ys, "o-", color=colour, label=label)
                axis.legend(fontsize=7)
                axis.set_title(schedules[place], fontsize=9)
                axis.set_ylim(bottom=0)
    figure.supxlabel("microbatches")
    figure.supylabel("peak memory of a rank, in activations")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=[*TORCH_SCHEDULES, *OUR_SCHEDULES], metavar="NAME")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16, 32, 64], metavar="COUNT")
    parser.add_argument("--kib", type=int, default=1024, help="of one microbatch's activations")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse_flags()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(options, f"{folder}/store"), nprocs=options.ranks)
