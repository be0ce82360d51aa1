"""Every way to wrap a stage for data or tensor parallelism, its training compared with the plain model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import reference
from tests.helpers.pipelines import held_by, make_schedule, make_stages, stages_allowed, step

MICROBATCHES, ROWS, WIDTH = 4, 8, 8
# What a test file names in WARM if it wraps.
WRAPPERS = "torch.distributed.fsdp torch.distributed.tensor.parallel torch.distributed._composable.replicate"
SCALINGS = ["scaled", "summed"]


class Part(nn.Module):
    """Two layers that tensor parallelism may split, and a norm that it leaves alone."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def _ddp(module: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module, process_group=mesh["data"].get_group(), **options)


def _fsdp(module: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.up, mesh=mesh["data"], **options)
    return fully_shard(module, mesh=mesh["data"])


def _fsdp_blocks(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.up, mesh=mesh["data"])
    fully_shard(module.down, mesh=mesh["data"])
    return module


def _replicate(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed._composable.replicate import replicate

    return replicate(module, process_group=mesh["data"].get_group())


def _replicate_fsdp(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(module, mesh=mesh["data"])


def _tensor_parallel(module: nn.Module, mesh: Any, *, local: bool = True) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(use_local_output=local)}
    return parallelize_module(module, mesh["tensor"], plan)


def _dtensors(module: nn.Module, mesh: Any) -> nn.Module:
    return _tensor_parallel(module, mesh, local=False)


def _fsdp_and_tensor_parallel(module: nn.Module, mesh: Any) -> nn.Module:
    return _fsdp(_tensor_parallel(module, mesh), mesh)


# name -> (how a stage's module is wrapped, the ranks of a pipeline stage that hold data and tensor shards, when)
KINDS: dict[str, tuple[Callable[..., nn.Module] | None, tuple[int, int], str]] = {
    "plain": (None, (2, 1), "before"),
    "DDP": (_ddp, (2, 1), "before"),
    "DDP, after": (_ddp, (2, 1), "after"),
    "DDP, views": (lambda m, mesh: _ddp(m, mesh, gradient_as_bucket_view=True), (2, 1), "before"),
    "DDP, unused": (lambda m, mesh: _ddp(m, mesh, find_unused_parameters=True), (2, 1), "after"),
    "FSDP2, before": (_fsdp, (2, 1), "before"),
    "FSDP2, after": (_fsdp, (2, 1), "after"),
    "FSDP2 of the blocks, after": (_fsdp_blocks, (2, 1), "after"),
    "replicate, before": (_replicate, (2, 1), "before"),
    "replicate, after": (_replicate, (2, 1), "after"),
    "replicate of FSDP2, after": (_replicate_fsdp, (2, 1), "after"),
    "TP": (_tensor_parallel, (1, 2), "after"),
    "TP, DTensors between": (_dtensors, (1, 2), "before"),
    "FSDP2 + TP": (_fsdp_and_tensor_parallel, (1, 2), "after"),
}


def _hybrid(module: nn.Module, mesh: Any) -> nn.Module:
    """Sharded over one dimension and replicated over the other; ranks that shard have the same data."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.up, mesh=mesh["data", "tensor"])
    return fully_shard(module, mesh=mesh["data", "tensor"])


ON_8_RANKS: dict[str, Any] = {
    "FSDP2 + TP of 8 ranks": (_fsdp_and_tensor_parallel, (2, 2), "after"),
    "HSDP of 8 ranks": (_hybrid, (2, 2), "after"),
}


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.to_local() if hasattr(output, "to_local") else output, target)


def whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def compare_with_plain(
    rank: int, schedule_name: str, kind: str, scaling: str, prepare: Callable[[nn.Module], object] | None = None
) -> list[str]:
    """Train: a scaled step and one that accumulates onto it, or a summed one; what differs from the plain model.

    ``prepare`` is called with each of the pipeline's modules before it is wrapped.
    """
    wrap, (data, tensor), when = (KINDS | ON_8_RANKS)[kind]
    mesh = dist.init_device_mesh("cpu", (2, data, tensor), mesh_dim_names=("pipeline", "data", "tensor"))
    place, replica, _ = mesh.get_coordinate()
    stages_per_rank = stages_allowed(schedule_name, 2)[-1]
    num_stages = 2 * stages_per_rank
    torch.manual_seed(1)
    plain = [Part(norm=kind != "TP, DTensors between") for _ in range(num_stages)]
    piped = {index: copy.deepcopy(plain[index]) for index in held_by(place, schedule_name, 2, stages_per_rank)}
    for module in piped.values() if prepare is not None else ():
        prepare(module)
    if wrap is not None and when == "before":
        piped = {index: wrap(module, mesh) for index, module in piped.items()}
    stages = make_stages(piped, num_stages, mesh["pipeline"].get_group())
    scale = scaling != "summed"
    schedule = make_schedule(schedule_name, stages, MICROBATCHES, loss, scale_grads=scale)
    if wrap is not None and when == "after":
        for stage in stages:
            stage.submod = wrap(stage.submod, mesh)
    expected: Gradients = {}
    found: list[str] = []
    for number in range(2 if scale else 1):
        mean = mean_gradients(plain, [10 * number + each for each in (range(data) if wrap else [replica])], scale)
        expected = {key: mean[key] + expected[key] for key in mean} if expected else mean  # type: ignore[operator]
        batch = batch_of(10 * number + replica)
        step(schedule, stages, batch)
        for stage in stages:
            bare = [name for name, _ in plain[stage.stage_index].named_parameters()]
            for name, parameter in zip(bare, stage.submod.parameters(), strict=True):
                got, where = whole(parameter.grad), f"{schedule_name}, {kind}, {scaling}: step {number}, {name}"
                if kind.startswith("FSDP2 of the blocks") and "norm" in name:
                    continue  # nobody reduces it
                found += reference.differences(
                    f"{where} of stage {stage.stage_index}", got, expected[stage.stage_index, name], exact=False
                )
    return found


Gradients = dict[tuple[int, str], Tensor | None]


def mean_gradients(plain: list[nn.Module], seeds: Iterable[int], scale: bool = True) -> Gradients:
    """The plain model's gradients, by stage and name: the mean over the batches of these seeds."""
    places = [(index, name) for index, module in enumerate(plain) for name, _ in module.named_parameters()]
    of_batches = []
    for seed in seeds:
        reference.train_step(plain, batch_of(seed), F.mse_loss, MICROBATCHES, scale=scale)
        of_batches.append([parameter.grad for module in plain for parameter in module.parameters()])
    means = [
        None if any(g is None for g in each) else sum(each) / len(each)
        for each in map(list, zip(*of_batches, strict=True))
    ]
    return dict(zip(places, means, strict=True))


def batch_of(seed: int) -> reference.Batch:
    generator = torch.Generator().manual_seed(seed)
    return reference.Batch(
        (torch.randn(ROWS, WIDTH, generator=generator),), torch.randn(ROWS, WIDTH, generator=generator)
    )
