"""Two pipelines of two ranks side by side, their gradients reduced by DDP, FSDP or replicate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests import api, ranks
from tests.pipelines import make_schedule

pytestmark = api.ours_only("is shown by torch's own tests")

MICROBATCHES = 4
PLACEMENTS = {"1F1B": (0, 1), "Interleaved1F1B": (0, 1, 0, 1), "ZBVZeroBubble": (0, 1, 1, 0)}


def _wrapped(module: nn.Module, kind: str, mesh: Any) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(module, process_group=mesh.get_group())
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        return fully_shard(module, mesh=mesh, reshard_after_forward=False)
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(module, mesh=mesh)


def _plain_gradients(modules: list[nn.Module], inputs: Tensor, targets: Tensor) -> list[Tensor]:
    for module in modules:
        module.zero_grad()
    for x, y in zip(inputs.flatten(0, 1).split(2), targets.flatten(0, 1).split(2), strict=True):
        for module in modules:
            x = module(x)
        (nn.functional.mse_loss(x, y) / (len(inputs) * MICROBATCHES)).backward()
    return [parameter.grad.clone() for module in modules for parameter in module.parameters()]


def _train(rank: int, kind: str, schedule: str) -> list[str]:
    """Steps with an evaluation between them; says which gradients differ from those of the whole model on all data."""
    from pp_runtime import PipelineStage

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    pipeline_rank, replica = divmod(rank, 2)
    torch.manual_seed(0)
    placement = PLACEMENTS[schedule]
    modules: list[nn.Module] = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in placement]
    plain = copy.deepcopy(modules)
    stages = [
        PipelineStage(
            _wrapped(modules[index], kind, mesh["dp"]), index, len(placement), torch.device("cpu"),
            group=mesh["pp"].get_group(),
        )
        for index, owner in enumerate(placement)
        if owner == pipeline_rank
    ]  # fmt: skip
    pipeline = make_schedule(schedule, stages, MICROBATCHES, nn.functional.mse_loss)
    differ = []
    for step in range(2):
        inputs, targets = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
        args = (inputs[replica],) if any(stage.is_first for stage in stages) else ()
        target = {"target": targets[replica]} if any(stage.is_last for stage in stages) else {}
        for stage in stages:
            stage.submod.zero_grad()
        pipeline.step(*args, **target)
        expected = _plain_gradients(plain, inputs, targets)
        for stage in stages:
            for position, parameter in enumerate(stage.submod.parameters()):
                gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                if not torch.allclose(gradient, expected[2 * stage.stage_index + position], atol=1e-6):
                    differ.append(f"step {step}, stage {stage.stage_index}, parameter {position}")
        pipeline.eval(*args)
    return differ


@pytest.mark.parametrize("schedule", PLACEMENTS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "replicate"])
def test_gradients_are_those_of_the_whole_batch(kind: str, schedule: str) -> None:
    assert ranks.run(_train, 4, kind=kind, schedule=schedule) == [[]] * 4
