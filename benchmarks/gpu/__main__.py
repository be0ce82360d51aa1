"""One command for a GPU: builds, checks that training is right on it, and measures; under nine minutes in all.

    make gpu OUT=results                                       # python3 with torch and CUDA, nvcc, ninja; no network
    python -m benchmarks.gpu --device sim --out results        # a dry run on tests/async_device, without a GPU
    python -m benchmarks.gpu --only machine build step_time --out results

Every step is a process of its own with a time limit (``steps.py`` says which and why in this order); one that fails or
takes too long is reported with its last lines, and the others go on. The results, gpu.json and gpu.txt, are written
after each step; a folder ``logs`` has all that the steps printed. Nothing is installed and pytest is not needed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import driver, report, steps

ROOT = Path(__file__).resolve().parents[2]


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "sim"], default="cuda")
    parser.add_argument("--out", type=Path, help="the folder of the results; $OUT or build/gpu/results where not given")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=steps.NAMES, help=", ".join(steps.NAMES))
    parser.add_argument("--seconds", type=float, default=530, help="for all steps together")
    return parser.parse_args()


def _commit() -> str:
    command = "git describe --always --dirty".split()
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "of an unknown commit"


def main() -> int:
    """Run the steps; 1 where one failed or took too long."""
    flags = parse_flags()
    driver.end_on_signals()
    # An empty OUT is as good as none.
    out = (flags.out or Path(os.environ.get("OUT") or ROOT / "build" / "gpu" / "results")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    cwd = ROOT / "build" / "gpu"  # where no other pp_runtime lies than the one that PYTHONPATH names
    cwd.mkdir(parents=True, exist_ok=True)
    heading = {
        "commit": _commit(),
        "device": flags.device,
        "began": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    begin = time.monotonic()

    def after_each(outcomes: list[driver.Outcome]) -> None:
        report.write(out, heading | {"seconds": time.monotonic() - begin}, outcomes)
        one = outcomes[-1]
        print(f"{one.name:<16} {one.seconds:6.1f} s  {one.status} {one.reason}", flush=True)

    chosen = steps.of(flags.device, ROOT, flags.only)
    outcomes = driver.run_all(chosen, flags.seconds, out / "logs", cwd, after_each)
    print(f"\n{(out / 'gpu.txt').read_text()}\nwritten to {out}: gpu.txt, gpu.json, logs")
    return int(any(one.status in ("failed", "over its limit") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
