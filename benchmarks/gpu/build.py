"""Builds pp_runtime with CUDA into build/gpu/lib; the checkout keeps its own build. For a dry run builds the device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import records

ROOT = Path(__file__).resolve().parents[2]


def main(kind: str) -> None:
    """Build, and import what was built."""
    begin = time.monotonic()
    if kind == "sim":
        from tests.async_device import device

        device.built()
        records.note("a dry run takes the CPU build of the checkout, and builds tests/async_device")
    else:
        flags = {"PP_RUNTIME_CUDA": "1", "CFLAGS": "-O2 -g0 -DNDEBUG", "PYTHONPATH": ""}
        command = "setup.py --quiet build --build-base build/gpu --build-lib build/gpu/lib"
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=os.environ | flags, check=True)
        asks = "import torch, pp_runtime._build_info as b; import pp_runtime; assert b.CUDA; print(pp_runtime.__file__)"
        subprocess.run([sys.executable, "-c", asks], check=True)
    jobs = os.environ.get("MAX_JOBS", "2")
    records.number("Build", f"{jobs} compilers at once", "time", time.monotonic() - begin, "s")
