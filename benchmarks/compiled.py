"""Step times with compiled stages: eager, compiled and run whole in I, compiled and cut in two; and their bounds.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --width 64 --length 32 --microbatches 8 --schedules 1F1B ZBVZeroBubble

Two processes, each pinned to a core with one thread. The model is the same for every schedule: pre-norm transformer
blocks, as many a rank, in one or two stages a rank. Blocks are compiled one by one by Inductor:

    eager   not compiled; pp_runtime splits the backward node by node
    whole   torch.compile(block): in I the compiled backward runs whole, W hands its weight gradients on
    cut     torch.compile(block, backend="pp_runtime"): dI in I, dW in W
    torch   torch.distributed.pipelining with torch.compile(block), where it takes compiled stages

All alternate, turns of steps in a row as in a job; medians. "bound" is the makespan of the schedule's order at the
times that F, I, W and B of those stages take alone, sampled between the turns: what it could reach with them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from stages_alone import StagesAlone
from step_time import RANKS, Batch, Pipeline, Size, bound, join, medians_of

SCHEDULES = ("1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
TORCH_TAKES = ("1F1B", "Interleaved1F1B")
KINDS: dict[str, Callable[[nn.Module], Any] | None] = {
    "eager": None,
    "whole": lambda block: block.compile(),
    "cut": lambda block: block.compile(backend="pp_runtime"),
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm(x))))


def blocks_of(kind: str, count: int, flags: argparse.Namespace, seed: int = 0) -> nn.Sequential:
    """So many blocks, the same ones for every kind, compiled one by one."""
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(Block(flags.width, flags.heads) for _ in range(count)))
    compile_block = KINDS[kind]
    for block in blocks if compile_block is not None else ():
        compile_block(block)
    return blocks


def stages_of(schedule: str, flags: argparse.Namespace, kind: str) -> tuple[dict[int, nn.Module], int]:
    """This rank's stages, and how many stages there are in all."""
    from pp_runtime import stages_of_rank

    held = stages_of_rank(schedule, dist.get_rank(), RANKS)
    return {i: blocks_of(kind, flags.blocks // len(held), flags, seed=i) for i in held}, RANKS * len(held)


def measure(schedule: str, flags: argparse.Namespace) -> dict[str, tuple[float, float | None]]:
    """For each kind the step and its bound in milliseconds; called on every rank."""
    from pp_runtime.orders.catalogue import build_order

    shape = (flags.rows, flags.length, flags.width)
    batch = Batch(Size("", nn.Identity, shape), flags.microbatches)
    held = {kind: stages_of(schedule, flags, kind) for kind in KINDS}
    count = held["eager"][1]
    pipelines = {kind: Pipeline("ours", schedule, modules, count, batch) for kind, (modules, _) in held.items()}
    if schedule in TORCH_TAKES:
        pipelines["torch"] = Pipeline("torch", schedule, stages_of(schedule, flags, "whole")[0], count, batch)
    order, placement = build_order(schedule, RANKS, count, flags.microbatches)
    actions = order[dist.get_rank()]
    alone = {kind: StagesAlone(modules, count - 1, shape, actions) for kind, (modules, _) in held.items()}

    def sample() -> None:
        for each in alone.values():
            each.sample_as_run()

    medians = dict(zip(pipelines, medians_of(list(pipelines.values()), flags.rounds, between=sample), strict=True))
    return {
        kind: (1e3 * step, 1e3 * bound(order, placement, alone[kind].times_as_run()) if kind in alone else None)
        for kind, step in medians.items()
    }


def work(rank: int, flags: argparse.Namespace, store: str) -> None:
    join(rank, store)
    torch._dynamo.config.cache_size_limit = 64
    show = partial(print, flush=True) if rank == 0 else lambda *_: None
    show(
        f"{flags.blocks} blocks a rank, width {flags.width}, {flags.heads} heads, {flags.microbatches} microbatches of "
        f"{flags.rows} x {flags.length}; torch {torch.__version__}; ms a step (bound), medians of {flags.rounds} turns"
    )
    show(f"{'schedule':22}" + "".join(f"{kind:>20}" for kind in (*KINDS, "torch")))
    for schedule in flags.schedules:
        found = measure(schedule, flags)
        cells = [
            (f"{step:.2f}" + (f" ({least:.2f})" if least is not None else "")) if kind in found else "-"
            for kind in (*KINDS, "torch")
            for step, least in [found.get(kind, (0.0, None))]
        ]
        show(f"{schedule:22}" + "".join(f"{cell:>20}" for cell in cells))
    dist.barrier()
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="NAME")
    parser.add_argument("--blocks", type=int, default=4, help="a rank; even")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="of a microbatch")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(parse_flags(), f"{folder}/store"), nprocs=RANKS)
