"""What compiled blocks take by themselves: F, I, W and B, the memory between I and W, and the seconds to compile.

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/compiled_blocks.py
    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/compiled_blocks.py --compile-seconds --blocks 2 24

Kinds are those of benchmarks/compiled.py, the same block of a transformer. Times are medians in ms of runs that
alternate; "I+W / B" holds the halves against the whole backward of the same kind. Memory is what glibc has given
out more than before the forward: after it, and between I and W, in MiB; without weights, their gradients and the input.
Seconds are of the first forward, I and W in a process with no cache of compiled code; "cut" then compiles dI and dW in
place of the whole backward.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from compiled import KINDS, blocks_of
from pp_runtime import _C


class Alone:
    """One kind's blocks, run without a pipeline."""

    def __init__(self, kind: str, count: int, flags: argparse.Namespace) -> None:
        self.blocks = blocks_of(kind, count, flags)
        self.x = torch.randn(flags.rows, flags.length, flags.width, requires_grad=True)
        self.gradient = torch.randn_like(self.x)
        self.times: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        output = self._timed("F", self.blocks, self.x)
        weights = self._timed("I", _C.input_backward, [output], [self.gradient], [self.x])[1]
        self._timed("W", weights.run)
        output = self.blocks(self.x)
        self._timed("B", torch.autograd.backward, output, self.gradient)

    def memory(self) -> tuple[float, float]:
        """MiB after F, and between I and W."""
        for weight in self.blocks.parameters():
            weight.grad = torch.zeros_like(weight)
        before = in_use()
        output = self.blocks(self.x)
        after_forward = in_use()
        halves = _C.input_backward([output], [self.gradient], [self.x])[1]
        del output
        between = in_use()
        halves.run()
        return (after_forward - before) / 2**20, (between - before) / 2**20

    def _timed(self, kind: str, work: Any, *args: Any) -> Any:
        begin = time.perf_counter()
        result = work(*args)
        self.times[kind].append(time.perf_counter() - begin)
        return result


class _InUse(ctypes.Structure):
    """glibc's mallinfo2."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def in_use() -> int:
    """Bytes that the process has from the allocator."""
    gc.collect()
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = _InUse
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def show_times(count: int, flags: argparse.Namespace) -> None:
    kinds = {kind: Alone(kind, count, flags) for kind in KINDS}
    for turn in range(flags.repeats + 3):
        for each in kinds.values():
            each.run()
            if turn < 3:
                each.times.clear()
    print(f"{'':8}" + "".join(f"{name:>10}" for name in ("F", "I", "W", "B", "I+W / B", "after F", "I to W")))
    for kind, each in kinds.items():
        f, i, w, b = (1e3 * statistics.median(each.times[name]) for name in "FIWB")
        cells = [*(f"{value:.2f}" for value in (f, i, w, b, (i + w) / b)), *(f"{part:.1f}" for part in each.memory())]
        print(f"{kind:8}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def show_seconds(count: int, flags: argparse.Namespace) -> None:
    """Each kind in a process of its own."""
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    for kind in ("whole", "cut"):
        command = [sys.executable, __file__, *sys.argv[1:], "--first-run", kind, "--blocks", str(count)]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        print(f"{count:3} blocks, {kind}: {shown.strip()} s", flush=True)


def first_run(kind: str, count: int, flags: argparse.Namespace) -> float:
    blocks = blocks_of(kind, count, flags)
    x: Tensor = torch.randn(flags.rows, flags.length, flags.width, requires_grad=True)
    begin = time.perf_counter()
    output = blocks(x)
    _C.input_backward([output], [torch.ones_like(output)], [x])[1].run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--compile-seconds", action="store_true")
    parser.add_argument("--first-run", choices=KINDS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.first_run:
        print(f"{first_run(flags.first_run, flags.blocks[-1], flags):.1f}")
        return
    print(f"torch {torch.__version__}, width {flags.width}, {flags.heads} heads, {flags.rows} x {flags.length}")
    for count in flags.blocks:
        print(f"\n{count} blocks, compiled one by one")
        (show_seconds if flags.compile_seconds else show_times)(count, flags)


if __name__ == "__main__":
    main()
