"""What splitting a backward costs: time and memory of I and W beside the whole backward, ours and torch's.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/split_backward.py

Small transformer blocks, so that what is measured is the splitting and not the products. Runs of the three kinds are
interleaved; each number is a median. On a machine that others use too, `--clock cpu` counts the process's own time.
`memory` is what lives between I and W of a microbatch, in units of what its forward left.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.pipelining import _backward as torchs
from torch.utils._python_dispatch import TorchDispatchMode

from pp_runtime import _backward as ours

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Setting:
    depth: int
    width: int
    heads: int
    batch: int
    length: int


@dataclass
class Times:
    whole: list[float] = field(default_factory=list)
    halves: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"ours": [], "torch": []})


def blocks(setting: Setting) -> nn.Module:
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                setting.width, setting.heads, 4 * setting.width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(setting.depth)
        )
    )


def forward(model: nn.Module, setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    model.zero_grad()
    x = torch.randn(setting.batch, setting.length, setting.width, requires_grad=True)
    output = model(x)
    return x, output, torch.randn_like(output)


def measure(setting: Setting, repeats: int, clock: Callable[[], float]) -> Times:
    torch.manual_seed(0)
    model = blocks(setting)
    weights = list(model.parameters())
    times = Times()
    for repeat in range(repeats + 1):
        x, output, gradient = forward(model, setting)
        start = clock()
        output.backward(gradient)
        whole = clock() - start
        halves = {}
        for name, module in (("ours", ours), ("torch", torchs)):
            x, output, gradient = forward(model, setting)
            start = clock()
            groups = module.stage_backward_input([output], [gradient], [x], iter(weights))[1]
            middle = clock()
            module.stage_backward_weight(iter(weights), groups)
            halves[name] = (middle - start, clock() - middle)
        if repeat > 0:  # the first warms up
            times.whole.append(whole)
            for name, pair in halves.items():
                times.halves[name].append(pair)
    return times


class Storages(TorchDispatchMode):
    """Counts the bytes of storages made while it is on that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Callable[[], bool], int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                weak = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.made[weak.cdata] = (weak.expired, storage.nbytes())
        return result

    def alive(self) -> int:
        gc.collect()
        return sum(size for expired, size in self.made.values() if not expired())


def memory(setting: Setting, module: object) -> tuple[int, int]:
    """Bytes that live after the forward, and between I and W, beside inputs and gradients of inputs."""
    torch.manual_seed(0)
    model = blocks(setting)
    with Storages() as storages:
        x, output, gradient = forward(model, setting)
        before = storages.alive()
        halves = module.stage_backward_input([output], [gradient], [x], model.parameters())[1]
        x.grad = None
        del output, gradient
        between = storages.alive()
        module.stage_backward_weight(model.parameters(), halves)
        return before, between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), width {options.width}, ", end="")
    print(
        f"batch {options.batch} x {options.length}, {options.clock} time, "
        f"medians of {options.repeats} interleaved runs\n"
    )
    print("depth   whole ms   ours I + W ms   ours/whole   torch I + W ms   torch/whole   memory ours   torch")
    for depth in options.depths:
        setting = Setting(depth, options.width, options.heads, options.batch, options.length)
        times = measure(setting, options.repeats, CLOCKS[options.clock])
        whole = statistics.median(times.whole)
        row = f"{depth:5}   {whole * 1e3:8.2f}"
        for pairs in times.halves.values():
            both = statistics.median(first + second for first, second in pairs)
            first = statistics.median(first for first, _ in pairs)
            row += f"   {first * 1e3:6.2f} + {(both - first) * 1e3:6.2f}   {both / whole:9.2f}  "
        for module in (ours, torchs):
            before, between = memory(setting, module)
            row += f"   {between / before:8.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
