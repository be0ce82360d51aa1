"""What the ranks of a pipeline tell each other before their first step, through the process group's store.

claim    what each rank holds and means to run; compared, so that a mistake is an error on every rank
offer    where each rank's shared memory is
reach    which ranks' memory each rank can read, so that both ends of a channel choose the same transport

The ranks count attempts to run a schedule on a group: a schedule's first step is one, and so is a stage or a schedule
that could not be made (refusals.py). An attempt that fails on any rank fails on all, so every rank counts alike:

    rank 0   attempt 0: refused, told        attempt 1: first step
    rank 1   attempt 0: first step, raises   attempt 1: first step
"""

from __future__ import annotations

import functools
import json
import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.errors import PipelineError, PipelineUsageError
from pp_runtime.running.agreement.failures import FailureRecord
from pp_runtime.running.agreement.groups import group_or_world


@dataclass(slots=True)
class _GroupStore:
    """A connection of our own to a group's store, and how many attempts this rank has counted.

    A look at the failure key must never stand behind somebody's blocking get; but a connection takes long to make, so
    all attempts share it.
    """

    store: Any
    attempts: int = 0


_stores: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupStore] = weakref.WeakKeyDictionary()


class RankAbsent(PipelineError):
    """A rank did not come to its first step in time."""


class Agreement:
    """The store as the ranks use it in one attempt to run a schedule; making it takes the attempt's number."""

    def __init__(self, group: dist.ProcessGroup | None, deadline: float) -> None:
        shared = _group_store(group_or_world(group))
        self.serial = shared.attempts
        shared.attempts += 1
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._prefix = f"pp_runtime/{self.serial}"
        self._store = shared.store
        self._deadline = deadline
        self.watch = _C.Watch(shared.store, f"{self._prefix}/failure", deadline)
        # Of the other ranks on this host, as they introduced themselves.
        self.pids: dict[int, int] = {}

    @staticmethod
    def begin(group: dist.ProcessGroup | None, deadline: float) -> Agreement:
        """The agreement of a first step.

        Attempts that the others gave up because this rank never came are passed over, where they have begun another.
        """
        agreement = Agreement(group, deadline)
        while agreement._missed():
            agreement = Agreement(group, deadline)
        return agreement

    def _missed(self) -> bool:
        text = self.watch.failure()
        record = FailureRecord.from_text(text) if text else None
        if record is None or not record.absent or record.rank != self.rank:
            return False
        following = f"pp_runtime/{self.serial + 1}"
        others = [rank for rank in range(self.size) if rank != self.rank]
        return any(self._store.check([f"{following}/claim/{rank}"]) for rank in others)

    @property
    def deadline(self) -> float:
        """Seconds that this rank waits for another before it gives up and names it."""
        return self._deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self._deadline = seconds
        self.watch.set_deadline(seconds)

    def reporter(self, board: _C.Board, patience: float) -> _C.Reporter:
        """Starts to tell the store where this rank is once it has been there for ``patience`` seconds."""
        return _C.Reporter(board, self._store, self._key("whereabouts", self.rank), patience)

    def report_of(self, rank: int) -> str:
        """What a rank's reporter told last; empty where it told nothing."""
        key = self._key("whereabouts", rank)
        try:
            return self._store.get(key).decode(errors="replace") if self._store.check([key]) else ""
        except RuntimeError:
            return ""  # the store is gone, and the reports with it

    def exchange(self, topic: str, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every rank's word on the topic, in rank order. Raises where a rank failed before it said anything."""
        try:
            self._store.set(self._key(topic, self.rank), json.dumps([os.getpid(), _host(), own]))
            since = time.monotonic()
            return [self._word_of(rank, topic, since) for rank in range(self.size)]
        except dist.DistError as error:
            # The process that keeps the store may be the rank that ended.
            if (ended := self.watch.ended()) is not None:
                self.watch.throw_lost(ended)
            raise _C.StoreLost(str(error)) from error

    def _word_of(self, rank: int, topic: str, since: float) -> dict[str, Any]:
        key = self._key(topic, rank)
        pause = 0.0005
        while not self._store.check([key]):
            self._look(topic, rank, since)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        pid, host, word = json.loads(self._store.get(key))
        self._meet(rank, pid, host)
        return word

    def _meet(self, rank: int, pid: int, host: str) -> None:
        """Watch the process of another rank, if it is on this host."""
        if rank != self.rank and rank not in self.pids and host == _host():
            self.pids[rank] = pid
            self.watch.watch_process(rank, pid)

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._prefix}/{topic}/{rank}"

    def _look(self, topic: str, rank: int, since: float) -> None:
        # In this order: a rank that failed tells why before it ends, and one may end once it has said its word.
        ended = self.watch.ended()
        record = self.watch.failure()
        if record:
            raise _C.PeerFailed(record)
        if ended is not None and not self._store.check([self._key(topic, rank)]):
            self.watch.throw_lost(ended)
        waited = time.monotonic() - since
        if waited > self._deadline:
            raise RankAbsent(
                f"rank {self.rank} waited {waited:.1f} s for rank {rank} to begin its first step ({topic}): "
                "call step() on every rank of the group",
                rank=rank,
            )


@functools.cache
def _host() -> str:
    """Names the set of processes among which a pid means one process: this boot of this host, and the pid namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{boot.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown, pid {os.getpid()}"


def _group_store(group: dist.ProcessGroup) -> _GroupStore:
    if group not in _stores:
        # A group of one rank has nobody to tell, and in a dry run its store keeps nothing.
        alone = dist.get_world_size(group) == 1
        store: Any = dist.HashStore() if alone else dist.distributed_c10d._get_process_group_store(group)
        _stores[group] = _GroupStore(_own_connection(store))
    return _stores[group]


def _own_connection(store: Any) -> Any:
    try:
        return store.clone()
    except dist.DistError:
        raise  # its keeper is gone
    except (RuntimeError, NotImplementedError):
        pass  # shared, then, with whoever else uses it
    try:
        store.check(["pp_runtime"])
    except (RuntimeError, NotImplementedError) as error:
        raise PipelineUsageError(
            f"the process group's store can neither be cloned nor asked for a key ({error}): make the process group "
            "with a TCPStore, a FileStore or a HashStore"
        ) from error
    return store
