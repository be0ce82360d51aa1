"""What splitting a backward costs on the device: benchmarks/split_backward.py, each half waited for."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks import split_backward as halves
from benchmarks.gpu import devices, records
from tests.helpers import device_cases

_TABLE = "Split backward: I + W over the whole backward, transformer blocks, medians"


def main(kind: str) -> None:
    """Depth after depth, ours beside torch's."""
    device = devices.load(kind)
    small = kind == "sim"
    repeats = 2 if small else 9

    def clock() -> float:
        device_cases.synchronize(device)
        return time.perf_counter()

    for depth in [1, 2] if small else [2, 8, 32]:
        setting = halves.Setting(depth, *((16, 2, 1, 4) if small else (1024, 16, 4, 512)))
        with torch.device(device):
            times = halves.measure(setting, repeats, clock)
        whole = statistics.median(times.whole)
        row = f"{depth} blocks, width {setting.width}, {setting.batch} x {setting.length}"
        records.number(_TABLE, row, "whole", whole * 1e3, "ms")
        for library, pairs in times.halves.items():
            both = statistics.median(first + second for first, second in pairs)
            records.number(_TABLE, row, library, both / whole, "times")
