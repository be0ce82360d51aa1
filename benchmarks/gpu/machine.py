"""What the numbers were measured on: card, driver, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu import records


def main(kind: str) -> None:
    """Record the facts; fails where there is no GPU."""
    records.fact("torch", torch.__version__)
    records.fact("cuda", torch.version.cuda or "none")
    records.fact("python", platform.python_version())
    records.fact("cores", len(os.sched_getaffinity(0)))
    if kind == "sim":
        records.fact("card", "none: the asynchronous device")
        records.fact("driver", "none")
        records.fact("nccl", "none")
        return
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU: --device sim makes a dry run without one")
    free, memory = torch.cuda.mem_get_info(0)
    records.fact("card", torch.cuda.get_device_name(0))
    records.fact("cards", torch.cuda.device_count())
    records.fact("memory", f"{memory / 2**30:.0f} GiB ({free / 2**30:.0f} free)")
    records.fact("driver", _driver())
    records.fact("nccl", ".".join(map(str, nccl_version())))
    records.fact("nvcc", shutil.which("nvcc") or "none")


def nccl_version() -> tuple[int, ...]:
    """Of the library that is loaded."""
    return tuple(torch.cuda.nccl.version()[:3])


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return said[0] if said else "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"
