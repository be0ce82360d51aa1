"""Two hosts made of network namespaces, and torchrun on both: c10d between them, shared memory on each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import api

pytestmark = api.ours_only("its transport is the process group")

ROOT = Path(__file__).resolve().parents[2]
PORT, LIMIT = 29_711, 100

PROGRAM = """
import sys
from pathlib import Path

import torch.distributed as dist
from pp_runtime.running import runtime
from tests.helpers.pipelines import Setting, Twins

def open_and_tell(*args, **kwargs):
    opened = open_channels(*args, **kwargs)
    for ends in (opened.senders, opened.receivers):
        kinds.update(f"{channel.sender}>{channel.receiver} {type(end).__name__[:4]}" for channel, end in ends.items())
    return opened

kinds, open_channels, runtime.open_channels = set(), runtime.open_channels, open_and_tell
dist.init_process_group("gloo")
rank = dist.get_rank()
twins = Twins(rank, Setting("1F1B", 6))
found = [line for number in range(3) for line in twins.train(f"step {number}", twins.example.batch(12, number))]
Path(sys.argv[1], str(rank)).write_text("|".join([*sorted(kinds), *found]))
dist.barrier()
dist.destroy_process_group()
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces that are joined by a cable: 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None or shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, ip and unshare")
    tag = uuid.uuid4().hex[:6]
    names = [f"pp{tag}a", f"pp{tag}b"]
    try:
        try:
            for name in names:
                run("ip", "netns", "add", name)
            run("ip", "link", "add", f"v{names[0]}", "type", "veth", "peer", "name", f"v{names[1]}")
            for number, name in enumerate(names, 1):
                run("ip", "link", "set", f"v{name}", "netns", name)
                run("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", f"v{name}")
                run("ip", "-n", name, "link", "set", f"v{name}", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def start(name: str, number: int, script: Path, reports: Path, log: Path) -> subprocess.Popen:
    """torchrun on one host, which sees neither the other's processes nor, then, their memory."""
    arguments = f"--nnodes 2 --nproc_per_node 2 --node_rank {number} --master_addr 10.77.0.1 --master_port {PORT}"
    isolated = ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"v{name}", "PP_RUNTIME_DEADLINE": "60",
    }  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(
            [*isolated, sys.executable, "-m", "torch.distributed.run", *arguments.split(), str(script), str(reports)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )


def test_ranks_of_two_hosts_train_as_one(hosts: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    # A file a rank: what several processes print at once may end up in one line.
    reports = tmp_path / "reports"
    reports.mkdir()
    logs = [tmp_path / f"{name}.log" for name in hosts]
    nodes = [
        start(name, number, script, reports, log) for number, (name, log) in enumerate(zip(hosts, logs, strict=True))
    ]
    try:
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(LIMIT)
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait(20)
    shown = "\n".join(log.read_text() for log in logs)
    assert {report.name: report.read_text() for report in reports.iterdir()} == {
        "0": "0>1 Shar|1>0 Shar",
        "1": "0>1 Shar|1>0 Shar|1>2 C10d|2>1 C10d",
        "2": "1>2 C10d|2>1 C10d|2>3 Shar|3>2 Shar",
        "3": "2>3 Shar|3>2 Shar",
    }, shown
