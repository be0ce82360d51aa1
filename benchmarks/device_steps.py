"""Steps with a large model's durations on the asynchronous device, ours and torch's, beside the schedule's bound.

    python benchmarks/device_steps.py --ranks 4 8 16
    python benchmarks/device_steps.py --ranks 4 --transfer-ms 0 0.3 2 --schedules 1F1B ZBVZeroBubble

No GPU is at hand, and none is needed for what a host does. The ranks are processes whose device is that of
tests/async_device: streams that sleep for as long as a kernel would take, with clocks of their own, so that a step's
time is exact to microseconds however late a thread wakes up; messages that begin when both ends have come to them, as
NCCL's do; launches that hold the host up. F, I and W of a stage are one product each. All that the host does is real:
schedule, autograd, messages' descriptions, and so is the order in which it queues things.

The bound is the makespan of the schedule's order at the same durations. Efficiency is bound / step; a step begins when
all ranks stand ready and ends when the last device is done. "host" is the processor time of a rank's process a step,
"ahead" how long before its device a rank's host is done, as a share of the step. "buffers" is what a rank's pipeline
keeps on its device between steps, in messages, "peak" the most that is in use during one, with activations and without
the batch, weights and their gradients. Medians over turns, in which the libraries alternate; of the ranks the mean, for
memory the most.

More hosts than cores need time that a cluster's would not: durations are multiplied by --slower, by default the ranks
over the cores, which leaves each host its share. Times are shown divided by it.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Messages through communicators, as between hosts: their transfers are what the durations are given for.
os.environ.setdefault("PP_RUNTIME_TRANSPORT", "c10d")

import torch
import torch.distributed as dist
from torch import nn

from pp_runtime.orders import leaves
from pp_runtime.orders.catalogue import build_order
from pp_runtime.timing import Costs, simulate
from tests.async_device import device
from tests.helpers import ranks
from tests.helpers.pipelines import EVERY_SCHEDULE, ONE_STAGE, held_by, placement, stages_allowed

NAMED = [name for name in EVERY_SCHEDULE if name != "Auto"]  # which has another order for every run

ROWS, WIDTH = 64, 64  # of a microbatch; only the first step computes, so the size decides nothing
MESSAGE = 4 * ROWS * WIDTH
TORCH_CANNOT = {"ZB1P", "ZB2P", "VHalf", "VMin"}


@dataclass(frozen=True)
class Durations:
    """In milliseconds."""

    forward: float
    transfer: float
    launch: float
    slower: float
    eager: bool

    def costs(self, num_stages: int) -> Costs:
        """What the bound pays; I and W take as long as F. The batch has no gradient, so the first stage has no I."""
        inputs = (0.0, *[self.forward] * (num_stages - 1))
        return Costs(self.forward, inputs, self.forward, transfer=self.transfer)

    def set(self, sim: Any) -> None:
        """Let the device take so long."""
        times = {"forward": self.forward, "transfer": self.transfer, "launch": self.launch}
        us = {name: 1e3 * value * self.slower for name, value in times.items()}
        sim.set_poison(False)
        sim.set_rendezvous(not self.eager)
        sim.sleep_instead_of_computing({"aten::mm": us["forward"]}, us["launch"], us["transfer"], us["launch"])


@dataclass
class Measured:
    """One library on one rank: what each of its timed steps took, in seconds."""

    begins: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    buffers: int = 0
    peak: int = 0


class Pipeline:
    """One library's schedule over this rank's modules."""

    def __init__(self, library: str, schedule: str, modules: dict[int, nn.Module], num_stages: int, count: int) -> None:
        if library == "ours":
            from pp_runtime import PipelineStage, schedules
        else:
            from torch.distributed.pipelining import PipelineStage, schedules  # type: ignore[assignment]

        self.sim, self.modules, self.measured = device.load(), modules, Measured()
        gc.collect()
        self._before = self.sim.memory_in_use()[0]
        stages = [PipelineStage(module, index, num_stages, device.DEVICE) for index, module in modules.items()]
        kind: Any = schedules.get_schedule_class(schedule)
        self.schedule = kind(stages[0] if schedule in ONE_STAGE else stages, count, loss_fn=nn.functional.mse_loss)
        rows = torch.empty(count * ROWS, WIDTH, device=device.DEVICE)
        self.args = (rows,) if 0 in modules else ()
        self.options: dict[str, Any] = {"target": rows} if num_stages - 1 in modules else {}
        self.step()  # computes: torch sends objects over the device
        gc.collect()
        self.measured.buffers = self._in_use() - self._before - (rows.nbytes if self.args or self.options else 0)

    def _in_use(self) -> int:
        for module in self.modules.values():
            module.zero_grad()
        self.sim.synchronize()
        return self.sim.memory_in_use(forget=True)[0]

    def step(self) -> None:
        """One step as programs write it."""
        for module in self.modules.values():
            module.zero_grad()
        losses = {"losses": []} if self.options else {}
        self.schedule.step(*self.args, **self.options, **losses)

    def timed(self) -> None:
        """One step from where all ranks stand ready to where this rank's device is done."""
        in_use = self._in_use()
        dist.barrier()
        took = time.process_time()
        begin = time.monotonic()
        self.step()
        returned = time.monotonic()
        took = time.process_time() - took
        self.sim.synchronize()
        kept = self.measured
        kept.begins.append(begin)
        kept.returns.append(returned)
        kept.ends.append(time.monotonic())
        kept.host.append(took)
        gradients = sum(parameter.nbytes for module in self.modules.values() for parameter in module.parameters())
        kept.peak = max(kept.peak, kept.buffers + self.sim.memory_in_use()[1] - in_use - gradients)


def work(
    rank: int, schedule: str, count: int, turns: int, durations: Durations, only: list[str]
) -> dict[str, Measured]:
    """All libraries on one rank, in turn."""
    sim = device.load()
    size = dist.get_world_size()
    per_rank = stages_allowed(schedule, 2)[-1]
    num_stages = len(placement(schedule, size, per_rank))

    def module() -> nn.Module:
        return nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False, device=device.DEVICE)

    modules = {index: module() for index in held_by(rank, schedule, size, per_rank)}
    pipelines: dict[str, Pipeline] = {}
    for library in only:
        if library == "ours" or schedule not in TORCH_CANNOT:
            pipelines[library] = Pipeline(library, schedule, modules, num_stages, count)
    sim.synchronize()
    dist.barrier()
    durations.set(sim)
    for turn in range(turns):
        names = list(pipelines)
        for name in names if turn % 2 else reversed(names):
            pipelines[name].timed()
    dist.barrier()
    return {name: pipeline.measured for name, pipeline in pipelines.items()}


def bound(schedule: str, size: int, count: int, durations: Durations) -> float:
    """In milliseconds. A pair of actions that may overlap is one after the other, as both libraries run it."""
    order, owners = build_order(schedule, size, size * stages_allowed(schedule, 2)[-1], count)
    alone = {rank: list(leaves(actions)) for rank, actions in order.items()}
    return simulate(alone, durations.costs(len(owners)), placement=owners).makespan


def columns(measured: Sequence[Measured], least: float, slower: float) -> str:
    """One library's part of a line."""
    steps = [
        max(one.ends[turn] for one in measured) - min(one.begins[turn] for one in measured)
        for turn in range(len(measured[0].ends))
    ]
    took = statistics.median(steps) * 1e3 / slower

    def mean_of(value: Callable[[Measured, int], float]) -> float:
        return statistics.mean(statistics.median(value(one, turn) for turn in range(len(one.ends))) for one in measured)

    host = mean_of(lambda one, turn: one.host[turn]) * 1e3
    ahead = mean_of(lambda one, turn: one.ends[turn] - one.returns[turn]) * 1e3 / slower / took
    buffers, peak = (max(getattr(one, name) for one in measured) / MESSAGE for name in ("buffers", "peak"))
    return f"{took:9.1f} {least / took:6.3f} {host:7.1f} {ahead:6.1%} {buffers:8.1f} {peak:7.1f}"


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--schedules", nargs="+", default=NAMED)
    parser.add_argument("--libraries", nargs="+", default=["ours", "torch"])
    parser.add_argument("--microbatches", type=int, help="two a rank where not given")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--forward-ms", type=float, default=4.0, help="also of I and of W")
    parser.add_argument("--transfer-ms", type=float, nargs="+", default=[0.3])
    parser.add_argument("--launch-us", type=float, default=10.0)
    parser.add_argument("--eager", action="store_true", help="a send ends without its receiver, as short ones do")
    parser.add_argument("--slower", type=float, help="ranks over cores where not given")
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    device.built()
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores; F = I = W = {flags.forward_ms} ms, launches of "
        f"{flags.launch_us} us; times in ms, medians of {flags.turns}"
    )
    head = f"{'step':>9} {'effic.':>6} {'host':>7} {'ahead':>6} {'buffers':>8} {'peak':>7}"
    print(f"{'':48} | {'ours':^48} | {'torch':^48}")
    print(f"{'schedule':22} {'ranks':>5} {'transfer':>8} {'bound':>10} | {head} | {head}")
    for size in flags.ranks:
        slower = flags.slower or max(1.0, size / (os.cpu_count() or 1))
        count = flags.microbatches or 2 * size
        for transfer in flags.transfer_ms:
            durations = Durations(flags.forward_ms, transfer, flags.launch_us / 1e3, slower, flags.eager)
            for schedule in flags.schedules:
                least = bound(schedule, size, count, durations)
                options: dict[str, Any] = {"backend": device.BACKENDS, "prepare": device.load}
                options |= {"schedule": schedule, "count": count, "turns": flags.turns, "durations": durations}
                limit = 60 + 10 * flags.turns * least * slower / 1e3
                found = ranks.run(work, size, limit, only=flags.libraries, **options)
                parts = [columns([one[name] for one in found], least, slower) for name in found[0]]
                print(f"{schedule:22} {size:5} {transfer:8.1f} {least:10.1f} | {' | '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
