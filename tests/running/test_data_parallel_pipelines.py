"""Pipelines of replicated or sharded stages, 2 x 2 ranks: the same gradients as the plain model's over all data."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh

from tests.helpers import api, models, ranks, reference
from tests.helpers.pipelines import (
    SPLITTING,
    backward_orders,
    held_by,
    make_schedule,
    make_stages,
    stages_allowed,
    step,
)

MICROBATCHES, STEPS = 4, 2
SCHEDULES = ["GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B", *SPLITTING]
# torch reduces nothing where backward is split; under DDP most of its schedules reduce at the first backward.
_SHARDED_SCHEDULES = [name for name in SCHEDULES if not (api.IS_TORCH and name in SPLITTING)]
_DDP_SCHEDULES = [name for name in SCHEDULES if name == "1F1B" or not api.IS_TORCH]


def _wrap(kind: str, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(module, process_group=mesh.get_group())
    if kind == "fully_shard":
        from torch.distributed.fsdp import fully_shard

        for part in module.children():
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh)
        return fully_shard(module, mesh=mesh)
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(module, mesh=mesh)


def _whole(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    return value.full_tensor() if isinstance(value, torch.distributed.tensor.DTensor) else value.detach()


class _Parallel:
    """This rank's stages, replicated over the mesh's first dimension, beside the plain model on all of the data."""

    def __init__(self, rank: int, kind: str, schedule: str, model: str) -> None:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
        self.replica, place = mesh.get_coordinate()
        stages_per_rank = stages_allowed(schedule, 2)[-1]
        self.num_stages = 2 * stages_per_rank
        self.example = models.build(models.MODELS[model], self.num_stages)
        piped = copy.deepcopy(self.example.stages)
        held = held_by(place, schedule, 2, stages_per_rank)
        self.modules = {index: _wrap(kind, piped[index], mesh["dp"]) for index in held}
        self.stages = make_stages(self.modules, self.num_stages, mesh.get_group("pp"))
        self.schedule = make_schedule(schedule, self.stages, MICROBATCHES, self.example.loss_fn)
        self.data_group = mesh.get_group("dp")
        learning = [parameter for module in self.modules.values() for parameter in module.parameters()]
        self.optimizers = [
            torch.optim.SGD(learning, lr=0.1),
            torch.optim.SGD([parameter for stage in self.example.stages for parameter in stage.parameters()], lr=0.1),
        ]

    def step(self, number: int) -> list[str]:
        """One update; what differs from the mean of the replicas' gradients."""
        batches = [self.example.batch(2 * MICROBATCHES, 10 * number + replica) for replica in range(2)]
        orders = backward_orders(self.schedule)
        plain = [parameter for stage in self.example.stages for parameter in stage.parameters()]
        gradients, losses = [], []
        for batch in batches:
            outcome = reference.train_step(self.example.stages, batch, self.example.loss_fn, MICROBATCHES, orders)
            gradients.append([parameter.grad for parameter in plain])
            losses.append(outcome.losses)
        for parameter, mine, other in zip(plain, *gradients, strict=True):
            parameter.grad = None if mine is None or other is None else (mine + other) / 2
        self.optimizers[0].zero_grad()
        got = step(self.schedule, self.stages, batches[self.replica])
        found = []
        if self.num_stages - 1 in self.modules:
            found += reference.differences(f"step {number} losses", got.losses, losses[self.replica], exact=False)
        found += self._compare(f"step {number}")
        for optimizer in self.optimizers:
            optimizer.step()
        return found

    def _compare(self, name: str) -> list[str]:
        found = []
        for index, module in self.modules.items():
            parameters = zip(module.named_parameters(), self.example.stages[index].parameters(), strict=True)
            for (key, mine), theirs in parameters:
                where = f"{name} stage {index} {key}"
                found += reference.differences(where, _whole(mine), theirs.detach(), exact=False)
                found += reference.differences(f"{where}.grad", _whole(mine.grad), theirs.grad, exact=False)
                found += self._replicas_differ(f"{where}.grad", mine.grad)
        return found

    def _replicas_differ(self, name: str, gradient: Tensor | None) -> list[str]:
        if gradient is None or isinstance(gradient, torch.distributed.tensor.DTensor):
            return []
        both = [torch.empty_like(gradient) for _ in range(2)]
        dist.all_gather(both, gradient, group=self.data_group)
        return reference.differences(f"{name} on the replicas", both[0], both[1])


def _train(rank: int, kind: str, schedule: str, model_names: list[str]) -> list[str]:
    found = []
    for model in model_names:
        parallel = _Parallel(rank, kind, schedule, model)
        for number in range(STEPS):
            found += [f"{model}: {line}" for line in parallel.step(number)]
    return found


@pytest.mark.parametrize("schedule", _DDP_SCHEDULES)
def test_stages_in_ddp_end_with_the_mean_gradient_on_every_replica(schedule: str) -> None:
    assert ranks.run(_train, 4, kind="DDP", schedule=schedule, model_names=["mlp", "transformer"]) == [[]] * 4


@pytest.mark.parametrize("kind", ["fully_shard", "replicate"])
@pytest.mark.parametrize("schedule", _SHARDED_SCHEDULES)
def test_sharded_and_replicated_stages_end_with_the_mean_gradient(schedule: str, kind: str) -> None:
    assert ranks.run(_train, 4, kind=kind, schedule=schedule, model_names=["mlp", "transformer"]) == [[]] * 4


def _count_reductions(rank: int, schedule: str) -> list[int]:
    """How often DDP's communication hook ran in each step, for all of this rank's stages together."""
    parallel = _Parallel(rank, "DDP", schedule, "mlp")
    calls = [0]

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        calls[-1] += 1
        return allreduce_hook(parallel.data_group, bucket)

    for module in parallel.modules.values():
        module.register_comm_hook(None, hook)
    for number in range(STEPS):
        assert parallel.step(number) == []
        calls.append(0)
    return [count // len(parallel.modules) for count in calls[:-1]]


@api.ours_only("reduces what its hidden backward made, too")
@pytest.mark.parametrize("schedule", _DDP_SCHEDULES)
def test_ddp_reduces_once_a_step(schedule: str) -> None:
    assert ranks.run(_count_reductions, 4, schedule=schedule) == [[1] * STEPS] * 4


def _evaluate(rank: int, kind: str) -> list[str]:
    parallel = _Parallel(rank, kind, "1F1B" if kind == "DDP" else "Interleaved1F1B", "mlp")
    found = []
    for number in range(3):
        batch = parallel.example.batch(2 * MICROBATCHES, number)
        expected = reference.evaluate(parallel.example.stages, batch, MICROBATCHES, parallel.example.loss_fn)
        got = step(parallel.schedule, parallel.stages, batch, "eval")
        if parallel.num_stages - 1 in parallel.modules:
            found += reference.differences(f"eval {number} output", got.outputs, expected.outputs, exact=False)
        found += parallel.step(number)
    return found


@api.ours_only("evaluation beside training breaks its state")
@pytest.mark.parametrize("kind", ["DDP", "fully_shard", "replicate"])
def test_evaluation_between_training_steps(kind: str) -> None:
    assert ranks.run(_evaluate, 4, kind=kind) == [[]] * 4
