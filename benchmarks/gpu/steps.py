"""The steps in their order: the most valuable first, as the time may end before the last.

What only CUDA has is left out of a dry run, and named there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import records
from benchmarks.gpu.driver import Step


@dataclass(frozen=True)
class _Kind:
    name: str  # of the step
    module: str  # in this folder; its function main(device, *arguments) does the step
    limit: float
    after: tuple[str, ...] = ("machine", "build")
    arguments: tuple[str, ...] = ()
    needs_cuda: bool = False
    environment: tuple[tuple[str, str], ...] = ()


# Two ranks share a GPU by turns, which NCCL's kernels, waiting for each other, bear only in small numbers.
_NCCL_OF_ONE_GPU = (
    ("NCCL_MULTI_RANK_GPU_ENABLE", "1"),
    ("NCCL_MAX_CTAS", "1"),
    ("NCCL_NVLS_ENABLE", "0"),
    ("NCCL_BUFFSIZE", "1048576"),
)
_KINDS = (
    _Kind("machine", "machine", 60, ()),
    _Kind("probe", "probe", 60, ("machine",), needs_cuda=True),
    _Kind("build", "build", 180, ()),
    _Kind("one_rank", "checks", 45, arguments=("1",)),
    _Kind("two_ranks", "checks", 90, arguments=("2",)),
    _Kind("step_time", "step_time", 130),
    _Kind("four_ranks", "checks", 60, arguments=("4",)),
    _Kind("p2p", "p2p", 45),
    _Kind("memory", "memory", 45),
    _Kind("split_backward", "split_backward", 40),
    _Kind("sanitizer", "sanitizer", 90, needs_cuda=True),
    # Streams that share one queue of the hardware must not hold each other up for ever.
    _Kind("one_queue", "checks", 40, arguments=("2", "few"), environment=(("CUDA_DEVICE_MAX_CONNECTIONS", "1"),)),
    _Kind("communicators", "communicators", 60, environment=_NCCL_OF_ONE_GPU),
)
NAMES = [kind.name for kind in _KINDS]


def of(device: str, root: Path, only: Sequence[str] | None = None) -> list[Step]:
    """The steps for a device."""
    library = [root / "build" / "gpu" / "lib"] if device == "cuda" else []
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, [*library, root])),
        "OMP_NUM_THREADS": "1",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count())),
        # Asks without touching the driver, which a process that forks must not have done.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }
    return [
        Step(
            kind.name,
            [sys.executable, "-m", "benchmarks.gpu.steps", kind.module, device, *kind.arguments],
            kind.limit,
            kind.after,
            "needs a GPU" if kind.needs_cuda and device != "cuda" else "",
            environment | dict(kind.environment),
        )
        for kind in _KINDS
        if only is None or kind.name in only
    ]


def main() -> int:
    """Do one step in this process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("module", choices=sorted({kind.module for kind in _KINDS}))
    parser.add_argument("device", choices=["cuda", "sim"])
    parser.add_argument("arguments", nargs="*")
    flags = parser.parse_args()
    try:
        importlib.import_module(f"benchmarks.gpu.{flags.module}").main(flags.device, *flags.arguments)
    except records.NotRun as reason:
        records.not_run("", str(reason))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
