"""Compiles and runs ipc_probe.cu: what device channels rest on, asked of the hardware before anything else is tried."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.gpu import records

SOURCE = Path(__file__).with_name("ipc_probe.cu")
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def main(kind: str) -> None:
    """On one GPU, with several numbers of hardware queues; between two where there are two."""
    nvcc = tool("nvcc")
    if nvcc is None:
        raise records.NotRun("there is no nvcc on the PATH or in CUDA_HOME/bin")
    major, minor = torch.cuda.get_device_capability(0)
    program = Path.cwd() / "ipc_probe"
    subprocess.run([nvcc, "-O2", f"-arch=sm_{major}{minor}", "-o", str(program), str(SOURCE)], check=True)
    seen: set[str] = set()
    for queues in (None, "1", "32"):
        _run([str(program)], "one GPU", queues, seen)
    if torch.cuda.device_count() > 1:
        _run([str(program), "0", "1"], "two GPUs", None, set())


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; None where there is none."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which(name) or shutil.which(name, path=str(folder))


def _run(command: list[str], where: str, queues: str | None, seen: set[str]) -> None:
    """Record the answers to questions that were not asked before."""
    environment = {name: value for name, value in os.environ.items() if name != _QUEUES}
    if queues is not None:
        environment[_QUEUES] = queues
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40, env=environment)
    print(ended.stdout, ended.stderr, flush=True)
    for question, value, unit in answers(ended.stdout):
        if question not in seen:
            seen.add(question)
            records.number(f"Probe, {where}", question, "answer", value, unit)
    if ended.returncode != 0:
        last = (ended.stdout + ended.stderr).splitlines()[-3:]
        how = f"{where}, {_QUEUES} {queues or 'unset'}"
        records.check(f"the probe comes to its end, {how}", [f"exit status {ended.returncode}", *last], 0.0)


def answers(text: str) -> list[tuple[str, float | str, str]]:
    """The program's lines: question, answer, unit."""
    found: list[tuple[str, float | str, str]] = []
    for line in text.splitlines():
        parts = line.split("\t")
        if len(parts) == 3:
            try:
                found.append((parts[0], float(parts[1]), parts[2]))
            except ValueError:
                found.append((parts[0], parts[1], parts[2]))
    return found
