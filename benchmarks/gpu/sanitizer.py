"""One short step of two ranks under compute-sanitizer's memcheck."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from benchmarks.gpu import records
from benchmarks.gpu.probe import tool


def main(kind: str, *arguments: str) -> None:
    """Run this module under the tool; with an argument, be what runs under it."""
    if arguments:
        _short_step(kind)
        return
    program = tool("compute-sanitizer")
    if program is None:
        raise records.NotRun("there is no compute-sanitizer on the PATH or in CUDA_HOME/bin")
    begin = time.monotonic()
    watched = [program, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9"]
    command = [*watched, sys.executable, "-m", "benchmarks.gpu.steps", "sanitizer", kind, "run"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | _STARTED_ANEW)
    said = ended.stdout + ended.stderr
    print(said)
    errors = [int(found) for found in re.findall(r"ERROR SUMMARY: (\d+) error", said)]
    problems = [] if ended.returncode == 0 and not any(errors) else said.splitlines()[-5:]
    if not errors:
        problems.append("compute-sanitizer gave no summary")
    records.check("memcheck of 1F1B on 2 ranks", problems, time.monotonic() - begin)


# The tool follows new programs; a fork of one that it watches it may not.
_STARTED_ANEW = {"PP_TEST_START": "spawn"}


def _short_step(kind: str) -> None:
    from tests.helpers import device_cases, ranks

    options = {"kind": kind, "count": 2, "schedule": "1F1B", "transport": "device"}
    found = ranks.run(device_cases.train, 2, 80, backend=device_cases.BACKENDS[kind], **options)
    if any(found):
        raise RuntimeError(f"differs from the plain model: {found}")
