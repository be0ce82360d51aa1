"""Faults planted at an action of a step, and what every rank meets of them.

A fault that its rank survives (an exception of any kind) is followed by the next one in the same processes, on the same
process group; one that it does not (killed, stopped, in an endless loop) has processes of its own.
"""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import api
from tests.helpers.models import WIDTH, rows_of_floats
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    Setting,
    compare,
    held_by,
    make_schedule,
    make_stages,
    stages_allowed,
    step,
)

MICROBATCHES = 4
DEADLINE = 1.2  # seconds, for ranks that stop or never come back


class BoomError(Exception):
    """What the user's own code raises."""


class Silent:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("a Silent says nothing")


# What each kind of fault raises where it happens. The ranks elsewhere raise PipelineError.
SURVIVED: dict[str, str] = {
    "exception in forward": "BoomError",
    "exception in backward": "BoomError",
    "exception in a hook": "BoomError",
    "exception in the loss": "BoomError",
    "exception in a custom function": "BoomError",
    "MemoryError": "MemoryError",
    "torch.OutOfMemoryError": "OutOfMemoryError",
    "Ctrl-C": "KeyboardInterrupt",
    "Ctrl-C in a wait": "KeyboardInterrupt",
    "sys.exit()": "SystemExit",
    "wrong shape": "RuntimeError",
    "output that cannot travel": "StageOutputError",
}
LOST = ("kill -9", "kill -9 in backward")
HELD_UP = ("kill -STOP", "endless loop")


@dataclass(frozen=True)
class Fault:
    """One fault: at which stage and microbatch of which pipeline it happens."""

    kind: str
    schedule: str
    stages_per_rank: int
    stage: int
    microbatch: int

    def owner(self, size: int) -> int:
        """The rank that it happens on."""
        return next(
            rank for rank in range(size) if self.stage in held_by(rank, self.schedule, size, self.stages_per_rank)
        )


def draw(generator: random.Random, kind: str, size: int, schedule: str | None = None) -> Fault:
    """A fault of this kind at a random place."""
    schedule = schedule or generator.choice(EVERY_SCHEDULE)
    stages_per_rank = generator.choice(stages_allowed(schedule, 2))
    num_stages = size * stages_per_rank
    stage = generator.randrange(num_stages)
    if kind == "exception in the loss":
        stage = num_stages - 1
    elif kind == "output that cannot travel":
        stage = generator.randrange(num_stages - 1)  # the last stage's output goes nowhere
    return Fault(kind, schedule, stages_per_rank, stage, generator.randrange(MICROBATCHES))


@dataclass(frozen=True)
class Seen:
    """What one rank met of a fault. ``seconds`` are from the fault to the error."""

    kind: str
    kinds: tuple[str, ...]
    text: str
    notes: str
    facts: dict[str, Any]
    seconds: float
    remains: str  # what the rank was left with that it should not have; empty when all is well


class Trap:
    """Springs once; tells when, in a file that outlives the process. Monotonic time is the same for all processes."""

    def __init__(self, fault: Fault, file: Path) -> None:
        self.fault, self.file = fault, file
        self.armed = False
        self.released = file.with_suffix(".released")

    def spring(self) -> None:
        self.armed = False
        self.note_time()
        kind = self.fault.kind
        if kind.startswith("exception"):
            raise BoomError(f"boom: {kind}")
        if kind == "MemoryError":
            raise MemoryError("boom: no memory")
        if kind == "torch.OutOfMemoryError":
            raise torch.OutOfMemoryError("boom: no device memory")
        if kind == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        if kind == "sys.exit()":
            raise SystemExit("boom: leaving")
        if kind.startswith("kill -9"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "kill -STOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "endless loop":
            while not self.released.exists():
                pass

    def note_time(self) -> None:
        self.file.with_suffix(".written").write_text(f"{time.monotonic()} {os.getpid()}")
        self.file.with_suffix(".written").rename(self.file)

    def time(self) -> float:
        return float(self.file.read_text().split()[0])

    def release(self) -> None:
        """Let a rank that is held up go on; called on another."""
        self.released.touch()
        if self.fault.kind == "kill -STOP":
            os.kill(int(self.file.read_text().split()[1]), signal.SIGCONT)


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spring: Callable[[], None]) -> Tensor:
        ctx.spring = spring
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.spring()
        return gradient, None


class Trapped(nn.Module):
    """A stage with a trap in it, if it is the fault's."""

    def __init__(self, trap: Trap | None) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0
        self._trap = [trap]  # in a list, so that it is no module's

    def forward(self, x: Tensor) -> Any:
        microbatch = self.calls % MICROBATCHES
        self.calls += 1
        y = torch.tanh(self.linear(x))
        (trap,) = self._trap
        if trap is None or not trap.armed or microbatch != trap.fault.microbatch:
            return y
        kind = trap.fault.kind
        if kind in ("exception in backward", "kill -9 in backward"):
            return _InBackward.apply(y, trap.spring)
        if kind == "exception in a hook":
            y.register_hook(lambda gradient: trap.spring())
            return y
        if kind in ("exception in the loss", "exception in a custom function"):
            return y
        if kind == "Ctrl-C in a wait":
            return y
        trap.spring()
        if kind == "wrong shape":
            return self.linear(x[:, :1])
        return {"y": y, "silent": Silent()} if kind == "output that cannot travel" else y


class Play:
    """One fault on one rank: a good step, then the one that fails."""

    def __init__(self, rank: int, size: int, fault: Fault, file: Path) -> None:
        self.rank, self.fault, self.is_owner = rank, fault, rank == fault.owner(size)
        self.trap = Trap(fault, file)
        held = held_by(rank, fault.schedule, size, fault.stages_per_rank)
        self.modules = {index: Trapped(self.trap if index == fault.stage else None) for index in held}
        self.stages = make_stages(self.modules, size * fault.stages_per_rank)
        self.schedule = make_schedule(fault.schedule, self.stages, MICROBATCHES, self._loss)
        self.losses = 0
        if fault.kind == "exception in a custom function":
            self.schedule.register_custom_function(api.schedules.REDUCE_GRAD, self._reduce)

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        microbatch, self.losses = self.losses % MICROBATCHES, self.losses + 1
        if self.trap.armed and self.fault.kind == "exception in the loss" and microbatch == self.fault.microbatch:
            self.trap.spring()
        return nn.functional.mse_loss(output, target)

    def _reduce(self, action: Any, context: Any) -> None:
        if self.trap.armed and action.stage_index == self.fault.stage:
            self.trap.spring()

    def run(self) -> Seen:
        step(self.schedule, self.stages, rows_of_floats(2 * MICROBATCHES, 0))
        before = [parameter.detach().clone() for parameter in self._parameters()]
        self.trap.armed = self.is_owner
        if self.fault.kind in HELD_UP:
            self.schedule.deadline = DEADLINE
        if self.fault.kind == "Ctrl-C in a wait":
            self._interrupt_a_wait()
        found = None
        try:
            step(self.schedule, self.stages, rows_of_floats(2 * MICROBATCHES, 1))
        except BaseException as error:
            found = error
        now = time.monotonic()
        if self.fault.kind in HELD_UP and not self.is_owner:
            self.trap.release()
        return self._seen(found, now, before)

    def _interrupt_a_wait(self) -> None:
        """Let a signal come while the rank waits for the others, which begin their step only then."""
        if not self.is_owner:
            while not self.trap.file.exists():
                time.sleep(0.005)
            return
        lookout = self.schedule._runtime._channels.lookout
        thread = threading.main_thread().ident

        def interrupt() -> None:
            while lookout.own().awaited is None or lookout.own().seconds < 0.02:
                time.sleep(0.005)
            self.trap.note_time()
            signal.pthread_kill(thread, signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def _seen(self, error: BaseException | None, now: float, before: list[Tensor]) -> Seen:
        same = all(map(torch.equal, before, self._parameters()))
        without = all(parameter.grad is None for parameter in self._parameters())
        remains = ("" if same else "other parameters; ") + ("" if without else "gradients; ")
        return Seen(
            self.fault.kind,
            tuple(kind.__name__ for kind in type(error).__mro__),
            str(error),
            "\n".join(getattr(error, "__notes__", ())),
            {name: getattr(error, name, None) for name in ("rank", "stage", "microbatch", "action", "waiting_for")},
            now - self.trap.time(),
            remains,
        )


def play_one(rank: int, size: int, fault: Fault, folder: str, transport: str = "auto") -> Seen:
    """One fault in processes of its own."""
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    return Play(rank, size, fault, Path(folder, "fault")).run()


def play_all(rank: int, size: int, faults: list[Fault], folder: str, transport: str = "auto") -> list[Seen]:
    """Fault after fault in the same processes, then a pipeline that is right; nothing may pile up meanwhile."""
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    assert compare(rank, Setting("1F1B", 4, steps=1)) == []  # what is made once a process group is made here
    held = _held()
    found = []
    for number, fault in enumerate(faults):
        found.append(Play(rank, size, fault, Path(folder, f"fault{number}")).run())
    assert compare(rank, Setting("1F1B", 4)) == []
    now = _held()
    assert now == held, f"before the faults {held}, after them {now}"
    return found


def _held() -> dict[str, Any]:
    """What a process can leave behind: descriptors, threads, segments."""
    gc.collect()
    descriptors = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    return {
        "descriptors": sorted(re.sub(r"\d+", "N", name) for name in descriptors),
        "threads": len(os.listdir("/proc/self/task")),
        "segments": Path("/proc/self/maps").read_text().count("memfd:pp_runtime"),
    }


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def complaints(fault: Fault, found: list[Seen | None], limit: float, transport: str) -> list[str]:
    """What is not as it must be: each rank's error, what it names, how long it took, what was left behind."""
    owner = fault.owner(len(found))
    lines = []
    for rank, seen in enumerate(found):
        if seen is None:
            continue
        wrong = []
        if rank == owner and fault.kind in SURVIVED:
            if SURVIVED[fault.kind] not in seen.kinds:
                wrong.append("not the error that was raised")
        else:
            if "PipelineError" not in seen.kinds:
                wrong.append("no PipelineError")
            told = _told(fault, owner, transport)
            if {name: seen.facts[name] for name in told} != told:
                wrong.append(f"does not tell {told}")
        if seen.seconds > limit:
            wrong.append(f"after {seen.seconds:.2f} s")
        if seen.remains:
            wrong.append(f"left {seen.remains}")
        lines += [f"{fault}, rank {rank}: {'; '.join(wrong)}: {seen}"] if wrong else []
    return lines


def _told(fault: Fault, owner: int, transport: str) -> dict[str, Any]:
    told: dict[str, Any] = {"rank": owner}
    silent = transport == "c10d" and fault.kind in (*LOST, "kill -STOP")  # its board cannot be read, nor can it report
    if "wait" not in fault.kind and not silent:
        told["stage"] = fault.stage
    if "forward" in fault.kind or "loss" in fault.kind:
        told["microbatch"] = fault.microbatch
    return told
