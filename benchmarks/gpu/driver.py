"""Runs steps one after the other, each in processes of its own that are all ended when its time is over.

A step that fails, or is over its limit, is an outcome like any other, with the last lines that it printed; the steps
after it go on, as far as the time for all of them lasts and they need nothing that it should have made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import records

_MARK = "PP_GPU_STEP"  # in the environment of a step's processes, however they left its session
_LAST_LINES = 12
_SHORTEST = 5.0  # seconds; with less left a step is not begun
_ENDING = 10.0  # seconds that killed processes may take to go


@dataclass(frozen=True)
class Step:
    """One command; ``after`` are steps without which it makes no sense."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    after: tuple[str, ...] = ()
    left_out: str = ""  # why it is not run at all
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a step went: passed, failed, over its limit, or not run."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    last_lines: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)


def run_all(
    steps: Iterable[Step], total: float, folder: Path, cwd: Path, after_each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run the steps within ``total`` seconds; ``after_each`` is told all outcomes so far. Logs go into ``folder``."""
    deadline = time.monotonic() + total
    outcomes: list[Outcome] = []
    for step in steps:
        missing = [name for name in step.after if any(one.name == name and one.status != "passed" for one in outcomes)]
        left = deadline - time.monotonic()
        if step.left_out:
            outcome = Outcome(step.name, "not run", reason=step.left_out)
        elif missing:
            outcome = Outcome(step.name, "not run", reason=f"needs the step {missing[0]}, which did not pass")
        elif left < _SHORTEST:
            outcome = Outcome(step.name, "not run", reason=f"no time was left of {total:g} s for all steps")
        else:
            outcome = run(step, min(step.limit, left), folder, cwd)
        outcomes.append(outcome)
        after_each(outcomes)
    return outcomes


def run(step: Step, limit: float, folder: Path, cwd: Path) -> Outcome:
    """Run one step for at most ``limit`` seconds, and end all that it started, also where it ended by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    log, found = folder / f"{step.name}.log", folder / f"{step.name}.jsonl"
    for old in (log, found):
        old.unlink(missing_ok=True)
    mark = uuid.uuid4().hex
    environment = os.environ | dict(step.environment) | {_MARK: mark, records.FILE: str(found)}
    begin = time.monotonic()
    reason = ""
    with log.open("ab") as output:  # several processes print into it: each line goes to the end
        try:
            process = subprocess.Popen(
                step.command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step.name, "failed", reason=str(error))
        try:
            code = process.wait(limit)
            status, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            status, reason = "over its limit", f"killed after {limit:.0f} s"
        finally:
            stuck = end_marked(mark)
            if not stuck:
                process.wait()
    written = records.read(found)
    whole = [record["reason"] for record in written if record["kind"] == "not run" and not record["what"]]
    if whole:
        status, reason = "not run", whole[0]
    if status == "passed" and any(record["kind"] == "check" and not record["passed"] for record in written):
        status, reason = "failed", "a check did not pass"
    if stuck:
        reason += f"; {stuck} of its processes could not be ended"
    took = time.monotonic() - begin
    lines = [] if status in ("passed", "not run") else log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return Outcome(step.name, status, took, reason, lines, written)


def end_marked(mark: str) -> int:
    """Kill every process that was started with the mark in its environment; how many would not go."""
    deadline = time.monotonic() + _ENDING
    while living := _marked(mark):
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return len(living)
        time.sleep(0.02)
    return 0


def _marked(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end_on_signals() -> None:
    """Let SIGTERM end the driver as an exception does, so that the step that runs is ended with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
