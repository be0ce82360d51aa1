"""Whether the advice is right: predicted step times and memory beside those of runs.

    python benchmarks/advice.py
    python benchmarks/advice.py --schedules 1F1B ZBVZeroBubble --microbatches 4 8 --width 256

Two processes, each pinned to a core with one thread. The model is an embedding, transformer blocks and a head over the
vocabulary. For each number of microbatches its units are measured on both ranks at once, then every choice is run as
the advice says, with its partition, and the units are measured again; "said" is the mean of both predictions. "ran" is
the median step time; "held" is the most bytes that operators had made and that were alive at once during a step, on the
rank where they were most, beside what "activations" of the advice says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from language_model import LanguageModel, token_loss
from pp_runtime import BuiltPipeline, advise, build_pipeline
from pp_runtime.advising import Choice
from pp_runtime.advising.tally import Tally
from step_time import RANKS, join

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV", "ZB1P", "VMin")


def step(pipeline: BuiltPipeline, tokens: Tensor) -> None:
    pipeline.step(tokens, target=tokens, return_outputs=False)


def ran(pipeline: BuiltPipeline, tokens: Tensor, steps: int) -> float:
    """The median seconds of a step, of the rank that took longest."""
    found = []
    for _ in range(steps):
        step(pipeline, tokens)
        found.append(pipeline.schedule.metrics().step_s)
    everyones: list[Any] = [None] * RANKS
    dist.all_gather_object(everyones, statistics.median(found))
    return max(everyones)


def held(pipeline: BuiltPipeline, tokens: Tensor) -> list[int]:
    """The most bytes that operators had alive during a step, by rank."""
    tally = Tally()
    with tally:
        step(pipeline, tokens)
    everyones: list[Any] = [None] * RANKS
    dist.all_gather_object(everyones, tally.most)
    return everyones


def check(choice: Choice, model: nn.Module, tokens: Tensor, flags: argparse.Namespace) -> tuple[float, list[int]]:
    """Run what the advice says."""
    pipeline = build_pipeline(
        model,
        choice.schedule,
        microbatches=choice.microbatches,
        loss_fn=token_loss,
        example=(tokens,),
        num_stages=choice.num_stages,
        partition=choice.sizes,
        scale_grads=False,  # so that gradients are there before the step, and are not counted in it
    )
    for _ in range(3):
        step(pipeline, tokens)
    return ran(pipeline, tokens, flags.steps), held(pipeline, tokens)


def advised(model: nn.Module, tokens: Tensor, microbatches: int, flags: argparse.Namespace) -> tuple[Choice, ...]:
    """What is said of every schedule."""
    return advise(
        model,
        RANKS,
        example=(tokens,),
        target=tokens,
        loss_fn=token_loss,
        microbatches=(microbatches,),
        schedules=flags.schedules,
        repeats=flags.repeats,
        group=dist.group.WORLD,
    ).choices


def work(rank: int, flags: argparse.Namespace, store: str) -> None:
    join(rank, store)
    torch.manual_seed(0)
    show = partial(print, flush=True) if rank == 0 else lambda *_: None
    model = LanguageModel(flags.blocks, flags.width, flags.heads, flags.vocabulary)
    tokens = torch.randint(flags.vocabulary, (flags.rows, flags.length))
    show(
        f"{flags.blocks} blocks of width {flags.width}, vocabulary {flags.vocabulary}, {flags.rows} rows of "
        f"{flags.length}; torch {torch.__version__}"
    )
    show(
        f"{'':22} {'stages':>6} {'microb.':>7} {'said ms':>8} {'ran ms':>8} {'ratio':>6}   "
        f"{'said MB':>8} {'held MB':>8} {'ratio':>6}"
    )
    ratios = []
    for microbatches in flags.microbatches:
        before = advised(model, tokens, microbatches, flags)
        runs = [check(choice, model, tokens, flags) for choice in before]
        # The machine is not always equally fast: what was said before the runs, and after them.
        after = {(each.schedule, each.num_stages): each for each in advised(model, tokens, microbatches, flags)}
        for choice, (seconds, most) in zip(before, runs, strict=True):
            step_s = (choice.step_s + after[choice.schedule, choice.num_stages].step_s) / 2
            fullest = max(range(RANKS), key=lambda rank: most[rank])
            said = choice.memory[fullest].activations
            ratios.append((step_s / seconds, said / most[fullest]))
            show(
                f"{choice.schedule:22} {choice.num_stages:6} {choice.microbatches:7} {1e3 * step_s:8.1f} "
                f"{1e3 * seconds:8.1f} {ratios[-1][0]:6.3f}   {said / 1e6:8.2f} {most[fullest] / 1e6:8.2f} "
                f"{ratios[-1][1]:6.3f}"
            )
    for what, found in zip(("step", "activations"), zip(*ratios, strict=True), strict=True):
        show(f"{what}: said / was {min(found):.3f} to {max(found):.3f}, median {statistics.median(found):.3f}")
    dist.barrier()
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=40)
    return parser.parse_args()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(parse_flags(), f"{folder}/store"), nprocs=RANKS)
