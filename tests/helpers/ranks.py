"""Run a function as several ranks with a process group of their own, in bounded time and leaving nothing behind."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE_AFTER_FAILURE = 5.0  # what the other ranks get to report their own end once one has failed
EXIT_TIMEOUT = 20.0
_OUTPUT_SHOWN = 6000


class RanksFailed(AssertionError):
    """A rank raised, died or ran out of time; the message holds every such rank's traceback and output."""


@dataclass(frozen=True)
class _Task:
    rank: int
    ranks: int
    store: str  # a file: connecting to a TCPStore can take seconds where names are resolved slowly
    backend: str
    timeout: float
    log: str
    call: bytes  # pickled (function, keyword arguments), opened inside the rank so that a failing import is reported
    prepare: bytes  # pickled function or None


def run(
    fn: Callable[..., Any],
    ranks: int = 2,
    timeout: float = 60.0,
    *,
    deaths: Collection[int] = (),
    backend: str = "gloo",
    prepare: Callable[[], Any] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(rank, **kwargs)`` in ``ranks`` new processes that share a process group; return their results in order.

    Processes are forked from a server that has torch loaded, so a call costs milliseconds and no state passes from
    one call to the next. ``fn`` lives at a module's top level and returns something picklable. Ranks in ``deaths``
    are meant to die; their result is None. Past ``timeout`` seconds all are killed, their stacks shown. ``prepare`` is
    called in each before it has a process group, as for a backend that must be registered.
    """
    __tracebackhide__ = True
    call, before = pickle.dumps((fn, kwargs)), pickle.dumps(prepare)
    with tempfile.TemporaryDirectory(prefix="pp-ranks-") as folder:
        members = [
            _Member(_Task(rank, ranks, f"{folder}/store", backend, timeout, f"{folder}/rank{rank}.log", call, before))
            for rank in range(ranks)
        ]
        try:
            _collect(members, timeout, deaths)
            _dismiss(members, deaths)
            return _results(members, deaths, timeout)
        finally:
            for member in members:
                member.kill()


class _Member:
    """One rank as the test process sees it."""

    def __init__(self, task: _Task) -> None:
        self.rank, self.log = task.rank, Path(task.log)
        self.connection, theirs = multiprocessing.Pipe()
        self.process = _fork_server().Process(target=_rank_main, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.result: Any = None
        self.finished = False
        self.problem: str | None = None

    def receive(self) -> None:
        """Take the rank's report, or the news that it ended without one."""
        try:
            kind, payload = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join(EXIT_TIMEOUT)
            self.problem = f"died without a report, exit code {self.process.exitcode}"
        else:
            if kind == "result":
                self.result = payload
            else:
                self.problem = payload
        self.finished = True

    def show_stacks(self) -> None:
        self.problem = "did not finish; its threads stood at"
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """End the rank and all that it started; harmless on one that has ended."""
        if self.process.is_alive() and self.process.pid is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not yet a group of its own
                self.process.kill()
        self.process.join(EXIT_TIMEOUT)
        self.process.close()
        self.connection.close()

    def report(self) -> str:
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        return f"--- rank {self.rank}: {self.problem}\n{output[-_OUTPUT_SHOWN:]}"


def _collect(members: list[_Member], timeout: float, deaths: Collection[int]) -> None:
    deadline = time.monotonic() + timeout
    waiting = {member.connection: member for member in members}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), left):
            member = waiting.pop(connection)  # type: ignore[arg-type]
            member.receive()
            if member.problem and member.rank not in deaths:
                deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
    for member in waiting.values():
        member.show_stacks()
    if waiting:
        time.sleep(0.5)  # for the signal's handler to write; nothing tells when it has


def _dismiss(members: list[_Member], deaths: Collection[int]) -> None:
    """Let ranks that have reported leave together, so that none closes a connection another still reads."""
    reported = [member for member in members if member.finished and member.rank not in deaths]
    for member in reported:
        try:
            member.connection.send_bytes(b"leave")
        except (BrokenPipeError, ConnectionError):
            continue  # it failed and is gone
    if any(member.problem for member in reported):
        return
    for member in reported:
        member.process.join(EXIT_TIMEOUT)
        if member.process.exitcode != 0:
            member.problem = f"returned, then did not exit cleanly: exit code {member.process.exitcode}"


def _results(members: list[_Member], deaths: Collection[int], timeout: float) -> list[Any]:
    __tracebackhide__ = True  # the ranks' own tracebacks say more
    failed = [member for member in members if member.problem and member.rank not in deaths]
    if failed:
        failed.sort(key=lambda member: not member.finished)  # who raised before who only waited
        head = f"{len(failed)} of {len(members)} ranks failed (limit {timeout:g} s)"
        raise RanksFailed("\n".join([head, *(member.report() for member in failed)]))
    return [member.result for member in members]


def _fork_server() -> Any:
    # PP_TEST_START=spawn: new interpreters, for what must see a process from its beginning or cannot be forked.
    context = multiprocessing.get_context(os.environ.get("PP_TEST_START", "forkserver"))
    context.set_forkserver_preload(["tests.helpers.warm"])
    return context


def _rank_main(task: _Task, connection: Connection) -> None:
    os.setsid()
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    descriptor = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)
    try:
        report = ("result", _call(task))
        message = pickle.dumps(report)
    except BaseException:
        message = pickle.dumps(("error", traceback.format_exc()))
    connection.send_bytes(message)
    try:
        connection.recv_bytes()
    except EOFError:
        return
    _leave()


def _end_with_the_tests() -> None:
    """A killed test run takes its ranks, and what they started, with it."""
    if tests := multiprocessing.parent_process():
        tests.join()
        os.killpg(0, signal.SIGKILL)


def _call(task: _Task) -> Any:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(task.rank), "LOCAL_RANK": str(task.rank), "WORLD_SIZE": str(task.ranks)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a container's host name need not resolve
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if prepare := pickle.loads(task.prepare):
        prepare()
    store = dist.FileStore(task.store, task.ranks)
    limit = datetime.timedelta(seconds=max(task.timeout, 1.0))
    dist.init_process_group(task.backend, store=store, rank=task.rank, world_size=task.ranks, timeout=limit)
    fn, kwargs = pickle.loads(task.call)
    return fn(task.rank, **kwargs)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
