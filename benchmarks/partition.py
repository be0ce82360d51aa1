"""What a balanced partition is worth: steps of a model with a heavy head, layers cut by count and by measured time.

    python benchmarks/partition.py
    python benchmarks/partition.py --schedules 1F1B Interleaved1F1B ZBVZeroBubble --vocabulary 16384

Two processes, each pinned to a core with one thread. The model is an embedding, equal transformer blocks and a head
over the vocabulary. "count" gives every stage as many blocks; "time" cuts by `layer_costs(..., "time")` with embedding
and head as extra of the first and last stage. Both alternate; medians.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from compiled import Block
from language_model import token_loss
from pp_runtime import Partition, layer_costs, partition, stages_of_rank
from step_time import RANKS, Pipeline, join, medians_of


class TokenBatch:
    """Tokens in, tokens out; the names that ``Pipeline`` reads."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.microbatches = flags.microbatches
        shape = (flags.rows * flags.microbatches, flags.length)
        self.x, self.y = (torch.randint(flags.vocabulary, shape) for _ in range(2))


def cut_by_time(stages: int, flags: argparse.Namespace) -> Partition:
    """Measured on rank 0, for all ranks alike."""
    hidden = torch.randn(flags.rows, flags.length, flags.width)
    tokens = torch.randint(flags.vocabulary, (flags.rows, flags.length))
    block = layer_costs([Block(flags.width, flags.heads)], "time", (hidden,), repeats=15)
    embedding = layer_costs([nn.Embedding(flags.vocabulary, flags.width)], "time", (tokens,), repeats=15)
    head = layer_costs([nn.Linear(flags.width, flags.vocabulary)], "time", (hidden,), repeats=15)
    made = [partition(block * flags.blocks, stages, extra={0: embedding[0], -1: head[0]})]
    dist.broadcast_object_list(made, 0)
    return made[0]


def measure(schedule: str, flags: argparse.Namespace) -> str:
    mine = stages_of_rank(schedule, dist.get_rank(), RANKS)
    count = RANKS * len(mine)
    cuts = {"count": partition([1.0] * flags.blocks, count), "time": cut_by_time(count, flags)}
    batch = TokenBatch(flags)
    pipelines = []
    for made in cuts.values():
        modules = {}
        for index in mine:
            blocks: list[nn.Module] = [Block(flags.width, flags.heads) for _ in range(made[index])]
            blocks = [nn.Embedding(flags.vocabulary, flags.width), *blocks] if index == 0 else blocks
            blocks += [nn.Linear(flags.width, flags.vocabulary)] if index == count - 1 else []
            modules[index] = nn.Sequential(*blocks)
        pipelines.append(Pipeline("ours", schedule, modules, count, batch, token_loss))  # type: ignore[arg-type]
    by_count, by_time = medians_of(pipelines, flags.rounds)
    sizes = " ".join(f"{'-'.join(map(str, made)):>12}" for made in cuts.values())
    return f"{schedule:22} {sizes} {1e3 * by_count:9.1f} {1e3 * by_time:9.1f} {by_count / by_time:7.2f}"


def work(rank: int, flags: argparse.Namespace, store: str) -> None:
    join(rank, store)
    torch.manual_seed(0)
    show = partial(print, flush=True) if rank == 0 else lambda *_: None
    show(
        f"{flags.blocks} blocks of width {flags.width}, vocabulary {flags.vocabulary}, {flags.microbatches} "
        f"microbatches of {flags.rows} x {flags.length}; torch {torch.__version__}; medians of {flags.rounds} turns"
    )
    show(f"{'':22} {'count':>12} {'time':>12} {'count ms':>9} {'time ms':>9} {'ratio':>7}")
    for schedule in flags.schedules:
        show(measure(schedule, flags))
    dist.barrier()
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(parse_flags(), f"{folder}/store"), nprocs=RANKS)
