"""Step time of pp_runtime beside torch.distributed.pipelining, and how near both come to the schedule's own bound.

    python benchmarks/step_time.py                                      # every schedule that torch has, every size
    python benchmarks/step_time.py --schedules GPipe 1F1B --sizes linear --csv step.csv --png step.png

Two processes, each pinned to a core with one thread, over gloo. Both libraries run in the same processes on the same
modules; they alternate, which goes first alternates too, and medians are compared. A turn is an untimed step and some
timed ones one after the other, as in a job; they end when both ranks are done.

The bound is the makespan of the schedule's order at the times that F, B, I and W of each stage take in plain PyTorch,
sampled between the turns with both cores busy: I is the backward for the inputs alone and W what B takes beyond it, so
a bound pays nothing for splitting, messages or bookkeeping. Efficiency is bound / step; "+split" is the same where the
bound pays for I and W what they take by themselves, split as pp_runtime does it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from stages_alone import StagesAlone
from step_time_table import Row, heading, line, save_png, write_csv

if TYPE_CHECKING:
    from pp_runtime.orders.ir import Order, Placement

RANKS = 2
STEPS_TIMED = 4  # in a turn
TORCH_SCHEDULES = (
    "GPipe",
    "1F1B",
    "LoopedBFS",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)


@dataclass(frozen=True)
class Size:
    """What a stage is, and the shape of one microbatch that goes through it."""

    title: str
    make: Callable[[], nn.Module]
    microbatch: tuple[int, ...]


def linear_stage() -> nn.Module:
    """Four small linear layers: next to no work, so a step is all bookkeeping."""
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def transformer_stage(width: int, depth: int = 2) -> nn.Module:
    """Some transformer layers."""
    layers = (
        nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        for _ in range(depth)
    )
    return nn.Sequential(*layers)


SIZES = {
    "linear": Size("4 linear layers, width 16", linear_stage, (4, 16)),
    "deep": Size("48 transformer layers, width 16, length 4", lambda: transformer_stage(16, 48), (1, 4, 16)),
    "small": Size("2 transformer layers, width 64, length 16", lambda: transformer_stage(64), (4, 16, 64)),
    "medium": Size("2 transformer layers, width 128, length 64", lambda: transformer_stage(128), (4, 64, 128)),
}


class Pipeline:
    """One library's schedule over this rank's stages."""

    def __init__(
        self,
        library: str,
        schedule: str,
        modules: dict[int, nn.Module],
        count: int,
        batch: Batch,
        loss_fn: Callable[..., torch.Tensor] = nn.functional.mse_loss,
    ) -> None:
        if library == "ours":
            from pp_runtime import PipelineStage
            from pp_runtime.schedules import PipelineScheduleMulti, get_schedule_class
        else:
            from torch.distributed.pipelining import PipelineStage
            from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
        group = dist.new_group()  # of its own, so that the two cannot touch each other's messages
        device = torch.device("cpu")
        stages = [PipelineStage(module, i, count, device, group=group) for i, module in modules.items()]
        schedule_class = get_schedule_class(schedule)
        takes_many = issubclass(schedule_class, PipelineScheduleMulti)
        self._schedule = schedule_class(stages if takes_many else stages[0], batch.microbatches, loss_fn=loss_fn)
        self._args = (batch.x,) if 0 in modules else ()
        self._target = batch.y if count - 1 in modules else None

    def step(self) -> None:
        losses: list[torch.Tensor] | None = [] if self._target is not None else None
        self._schedule.step(*self._args, target=self._target, losses=losses, return_outputs=False)


def own_modules(size: Size, schedule: str, ranks: int) -> tuple[dict[int, nn.Module], int]:
    """This rank's stages of a pipeline, as many as the schedule takes or two, and how many there are in all."""
    from pp_runtime import stages_of_rank

    held = stages_of_rank(schedule, dist.get_rank(), ranks)
    return {i: size.make() for i in held}, ranks * len(held)


class Batch:
    """Inputs and targets of a step."""

    def __init__(self, size: Size, microbatches: int) -> None:
        rows, *rest = size.microbatch
        self.microbatches = microbatches
        self.x = torch.randn(rows * microbatches, *rest)
        self.y = torch.randn(rows * microbatches, *rest)


def timed_steps(pipeline: Pipeline) -> tuple[float, float]:
    """When this rank began and ended some steps, as a job does them; ranks of one host share the clock."""
    dist.barrier()
    pipeline.step()
    begin = time.monotonic()
    for _ in range(STEPS_TIMED):
        pipeline.step()
    return begin, time.monotonic()


def medians_of(pipelines: Sequence[Pipeline], rounds: int, between: Callable[[], None] = lambda: None) -> list[float]:
    """The median step of each pipeline in seconds. A round has a turn of each, and what is done ``between`` rounds."""
    for pipeline in pipelines:
        for _ in range(3):
            pipeline.step()
    moments: list[list[tuple[float, float]]] = [[] for _ in pipelines]
    for turn in range(rounds):
        numbers = range(len(pipelines))
        for i in reversed(numbers) if turn % 2 else numbers:
            moments[i].append(timed_steps(pipelines[i]))
        dist.barrier()
        between()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, moments)
    medians = []
    for i in range(len(pipelines)):
        spans = [
            (max(end for _, end in ranks) - max(begin for begin, _ in ranks)) / STEPS_TIMED
            for ranks in zip(*(theirs[i] for theirs in everyones), strict=True)
        ]
        medians.append(statistics.median(spans))
    return medians


def bound(order: Order, placement: Placement, own_times: dict[int, dict[str, float]]) -> float:
    """The makespan in seconds of the order at the stages' own times, of which each rank gives its part."""
    from pp_runtime.timing.costs import Costs
    from pp_runtime.timing.simulation import simulate

    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own_times)
    of_stage = {i: times for theirs in everyones for i, times in theirs.items()}
    costs = Costs.from_mapping({kind: [of_stage[i][kind] for i in range(len(placement))] for kind in "FIWB"})
    return simulate(order, costs, placement=placement).makespan


def measure(name: str, schedule: str, microbatches: int, rounds: int) -> Row:
    """One line of the table; called on every rank."""
    from pp_runtime.orders.catalogue import build_order
    from pp_runtime.orders.ir import BACKWARD_WEIGHT, leaves

    size = SIZES[name]
    modules, count = own_modules(size, schedule, RANKS)
    batch = Batch(size, microbatches)
    libraries = ["ours", "torch"] if schedule in TORCH_SCHEDULES else ["ours"]
    pipelines = [Pipeline(library, schedule, modules, count, batch) for library in libraries]
    order, placement = build_order(schedule, RANKS, count, microbatches)
    alone = StagesAlone(modules, count - 1, size.microbatch, order[dist.get_rank()])
    ours, *others = medians_of(pipelines, rounds, between=alone.sample)
    theirs = others[0] if others else None
    least = bound(order, placement, alone.times())
    splits = any(action.computation_type is BACKWARD_WEIGHT for actions in order.values() for action in leaves(actions))
    split = bound(order, placement, alone.times_when_split()) if splits else None
    return Row(
        size=name,
        schedule=schedule,
        microbatches=microbatches,
        ours_ms=ours * 1e3,
        torch_ms=theirs and theirs * 1e3,
        torch_over_ours=theirs and theirs / ours,
        bound_ms=least * 1e3,
        efficiency=least / ours,
        torch_efficiency=theirs and least / theirs,
        efficiency_when_split=split and split / ours,
    )


def join(rank: int, store: str) -> int:
    """Have this process be a rank, with a core of its own and one thread; returns how many cores there are."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    return len(cores)


def work(rank: int, flags: argparse.Namespace, store: str) -> None:
    """One rank: measure every line, and print them on rank 0."""
    cores = join(rank, store)
    torch.manual_seed(rank)
    rows = []
    if rank == 0:
        print(heading(RANKS, cores, flags.microbatches, flags.rounds), flush=True)
    for name in flags.sizes:
        for schedule in flags.schedules:
            rows.append(measure(name, schedule, flags.microbatches, flags.rounds))
            if rank == 0:
                print(line(rows[-1]), flush=True)
    if rank == 0 and flags.csv:
        write_csv(rows, flags.csv)
    if rank == 0 and flags.png:
        save_png(rows, {name: size.title for name, size in SIZES.items()}, flags.png)
    dist.barrier()
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--schedules", nargs="+", default=TORCH_SCHEDULES, metavar="NAME", help="also those torch lacks"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21, help="turns of each library")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(parse_flags(), f"{folder}/store"), nprocs=RANKS)
