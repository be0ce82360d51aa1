"""What README.md says of torch.distributed.pipelining, shown: the same program on torch's package and on this one.

    python -m tests.docs.torch_facts

Each fact is a small program on two ranks (four with data parallelism) over gloo. Printed is what became of it under
both packages. An error is the outcome of the rank that raised first.
"""

from __future__ import annotations

import datetime
import importlib
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import ranks

TORCH, OURS = "torch.distributed.pipelining", "pp_runtime"
CPU = torch.device("cpu")
SECONDS = 40.0
TIME_OUT = 10.0  # of the process group whose rank fails


class Nested(nn.Module):
    """Gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.layer(x)}


class TakesNested(nn.Module):
    """Takes a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.layer(x["hidden"])


class Fails(nn.Module):
    """Raises on its fifth microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            raise ValueError("this module is broken")
        return self.layer(x)


class TakesPositions(nn.Module):
    """Adds a keyword input, which broadcasts over the rows."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + positions


class Hooks(nn.Module):
    """Counts the gradients of its input by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fired = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self.count)
        return self.layer(x)

    def count(self, gradient: Tensor) -> None:
        self.fired += 1


class Skips(nn.Module):
    """Its last layer takes what its first gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        h = self.layers[1](first)
        h = self.layers[2](h)
        return self.layers[3](h + first)


def train(package: str, schedule: str, modules: Sequence[nn.Module], microbatches: int, rows: int) -> None:
    """Train on one batch; this rank's stages are its modules, placed in loops."""
    api = importlib.import_module(package)
    rank, world = dist.get_rank(), dist.get_world_size()
    count = world * len(modules)
    stages = [api.PipelineStage(module, rank + world * i, count, CPU) for i, module in enumerate(modules)]
    single = schedule == "Schedule1F1B"
    made = getattr(api, schedule)(stages[0] if single else stages, microbatches, loss_fn=nn.functional.mse_loss)
    x = torch.randn(rows, 4)
    made.step(x) if rank == 0 else made.step(target=x)


def smaller_batch(rank: int, package: str) -> str:
    """Forward only, 8 rows of 8.0, then 4 rows of 4.0: what the second step returns"""
    api = importlib.import_module(package)
    schedule = api.ScheduleGPipe(api.PipelineStage(nn.Identity(), rank, 2, CPU), 2)
    for rows in (8, 4):
        x = torch.full((rows, 1), float(rows))
        output = schedule.step(x) if rank == 0 else schedule.step()
    return "" if output is None else f"{len(output)} rows with the values {output.unique().tolist()}"


def few_microbatches(rank: int, package: str) -> str:
    """1F1B with fewer microbatches than stages."""
    train(package, "Schedule1F1B", [nn.Linear(4, 4)], 1, 4)
    return "trains"


def uneven_rounds(rank: int, package: str) -> str:
    """Interleaved1F1B on 2 ranks, 5 microbatches."""
    train(package, "ScheduleInterleaved1F1B", [nn.Linear(4, 4), nn.Linear(4, 4)], 5, 5)
    return "trains"


def uneven_rows(rank: int, package: str) -> str:
    """8 rows in 3 microbatches, with a loss"""
    train(package, "Schedule1F1B", [nn.Linear(4, 4)], 3, 8)
    return "trains"


def keyword_of_one_row(rank: int, package: str) -> str:
    """A keyword input with a batch of 1 beside 4 rows, 2 microbatches"""
    api = importlib.import_module(package)
    schedule = api.ScheduleGPipe(api.PipelineStage(TakesPositions(), rank, 2, CPU), 2)
    positions = torch.arange(4.0)[None]
    schedule.step(torch.zeros(4, 4), positions=positions) if rank == 0 else schedule.step(positions=positions)
    return "runs"


def nested(rank: int, package: str) -> str:
    """A dict between stages."""
    train(package, "Schedule1F1B", [TakesNested() if rank else Nested()], 2, 4)
    return "trains"


def compiled(rank: int, package: str) -> str:
    """A zero-bubble schedule of compiled stages."""
    modules = [torch.compile(nn.Linear(4, 4), backend="aot_eager") for _ in range(2)]
    train(package, "ScheduleInterleavedZeroBubble", modules, 2, 4)
    return "trains"


def skip_connection(rank: int, package: str) -> str:
    """A skip connection over stages, two stages a rank."""
    api = importlib.import_module(package)
    split = {f"layers.{i}": api.SplitPoint.BEGINNING for i in (1, 2, 3)}
    pipe = api.pipeline(Skips(), (torch.randn(2, 4),), split_spec=split)
    stages = [pipe.build_stage(index, CPU) for index in (rank, rank + 2)]
    schedule = api.ScheduleInterleaved1F1B(stages, 2, loss_fn=nn.functional.mse_loss)
    x = torch.randn(4, 4)
    schedule.step(x) if rank == 0 else schedule.step(target=x)
    return "trains"


def batch_norm(rank: int, package: str) -> str:
    """What batch norm has counted after a step of 4 microbatches."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    train(package, "Schedule1F1B", [module], 4, 8)
    return f"{module[1].num_batches_tracked.item()} batches"


def input_hooks(rank: int, package: str) -> str:
    """A hook that a stage puts on its input: how often it fires in steps of 4 microbatches"""
    api = importlib.import_module(package)
    module = Hooks()
    schedule = api.Schedule1F1B(api.PipelineStage(module, rank, 2, CPU), 4, loss_fn=nn.functional.mse_loss)
    counts = []
    for _ in range(3):
        module.fired = 0
        x = torch.randn(8, 4)
        schedule.step(x) if rank == 0 else schedule.step(target=x)
        counts.append(module.fired)
    return f"{counts} times in three steps"


def replicas(rank: int, package: str) -> str:
    """DistributedDataParallel stages, a zero-bubble schedule: do the replicas of a stage have equal gradients?"""
    api = importlib.import_module(package)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    pipe, data = mesh["pipe"].get_group(), mesh["data"].get_group()
    stage_rank = dist.get_rank(pipe)
    torch.manual_seed(stage_rank)
    modules = [nn.parallel.DistributedDataParallel(nn.Linear(4, 4), process_group=data) for _ in range(2)]
    stages = [api.PipelineStage(m, stage_rank + 2 * i, 4, CPU, group=pipe) for i, m in enumerate(modules)]
    schedule = api.ScheduleInterleavedZeroBubble(stages, 2, loss_fn=nn.functional.mse_loss)
    torch.manual_seed(10 + dist.get_rank(data))  # each replica its own rows
    x = torch.randn(4, 4)
    schedule.step(x) if stage_rank == 0 else schedule.step(target=x)
    gradient = modules[0].module.weight.grad
    other = gradient.clone()
    dist.all_reduce(other, dist.ReduceOp.MAX, group=data)
    least = gradient.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=data)
    return "gradients equal" if torch.allclose(other, least) else "gradients DIFFER, no error"


def failure(rank: int, package: str) -> str:
    """An exception in stage 1: when stage 0 raises, and what."""
    api = importlib.import_module(package)
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIME_OUT))
    stage = api.PipelineStage(Fails() if rank else nn.Linear(4, 4), rank, 2, CPU, group=group)
    schedule = api.ScheduleGPipe(stage, 8, loss_fn=nn.functional.mse_loss)
    x, begin, seen = torch.randn(8, 4), time.monotonic(), "no error"
    try:
        schedule.step(x) if rank == 0 else schedule.step(target=x)
    except Exception as error:
        seen = f"after {time.monotonic() - begin:.1f} s: {str(error).splitlines()[0]}"
    dist.barrier()  # whoever is told late finds the other still here
    return seen


FACTS: tuple[tuple[Callable[..., str], int], ...] = (
    (smaller_batch, 2),
    (few_microbatches, 2),
    (uneven_rounds, 2),
    (uneven_rows, 2),
    (keyword_of_one_row, 2),
    (nested, 2),
    (compiled, 2),
    (skip_connection, 2),
    (batch_norm, 2),
    (input_hooks, 2),
    (replicas, 4),
    (failure, 2),
)


def outcome(fact: Callable[..., str], count: int, package: str) -> str:
    """What the last rank returned (of a failure the first), or the first line of the error of who raised first."""
    try:
        results = ranks.run(fact, count, timeout=SECONDS, package=package)
    except ranks.RanksFailed as failed:
        lines = [line.strip() for line in str(failed).splitlines()]
        return next((line for line in lines if line.partition(":")[0].endswith("Error")), lines[0])
    return results[0] if fact is failure else results[-1]


if __name__ == "__main__":
    print(f"torch {torch.__version__}, gloo; the time-out of the process group whose rank fails is {TIME_OUT:g} s")
    for fact, count in FACTS:
        print(f"\n{(fact.__doc__ or '').rstrip('.')}")
        for package in (TORCH, OURS):
            print(f"  {package:<29} {outcome(fact, count, package)[:150]}", flush=True)
