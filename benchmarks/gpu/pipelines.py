"""One library's schedule over a rank's stages on its device, and the sizes of stages that are measured."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu import devices
from benchmarks.gpu.host_staging import stage_through_the_host
from tests.helpers.pipelines import EVERY_SCHEDULE, ONE_STAGE, held_by, placement, stages_allowed

OURS_ALONE = ", ours alone"  # ends an item that failed with all libraries
SCHEDULES = [name for name in EVERY_SCHEDULE if name != "Auto"]  # which has another order for every run


@dataclass(frozen=True)
class Size:
    """What a stage is, and the shape of one microbatch."""

    title: str
    make: Callable[[], nn.Module]
    microbatch: tuple[int, ...]
    dtype: torch.dtype


def _linear() -> nn.Module:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))


def _transformer(width: int, heads: int) -> nn.Module:
    layers = (
        nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        for _ in range(2)
    )
    return nn.Sequential(*layers)


SIZES = {
    "linear": Size("4 linear layers, width 16", _linear, (4, 16), torch.float32),
    "tiny": Size("2 transformer layers, width 32, 2 x 8", lambda: _transformer(32, 2), (2, 8, 32), torch.float32),
    "large": Size(
        "2 transformer layers, width 2048, 2 x 1024, bfloat16",
        lambda: _transformer(2048, 16),
        (2, 1024, 2048),
        torch.bfloat16,
    ),
}


def libraries(kind: str, size: int, schedule: str, item: str = "") -> list[str]:
    """Which are measured: ours, ours over NCCL where each rank has a GPU, torch's where it has the schedule."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    if item.endswith(OURS_ALONE) or not has_numpy():
        return ["ours"]
    found = ["ours"] + (["ours, NCCL"] if devices.nccl_serves(kind, size) else [])
    try:
        get_schedule_class(schedule)
    except ValueError:
        return found
    return [*found, "torch"]


def has_numpy() -> bool:
    """Whether torch's pipelines run, whose ranks send each other objects with it."""
    return importlib.util.find_spec("numpy") is not None


def torch_goes_over(kind: str, size: int) -> str:
    """What carries torch's messages, as a sentence."""
    if not has_numpy():
        return "ours alone: torch's pipelines need numpy, and there is none"
    if devices.nccl_serves(kind, size):
        return "torch over NCCL, each rank on a GPU of its own"
    return "ranks share a device, which NCCL refuses: torch over gloo, each message through host memory on its way"


def own_modules(size: Size, schedule: str, rank: int, device: torch.device) -> tuple[dict[int, nn.Module], int]:
    """This rank's stages, two where the schedule takes several, and how many there are in all."""
    ranks, per_rank = dist.get_world_size(), stages_allowed(schedule, 2)[-1]
    held = held_by(rank, schedule, ranks, per_rank)
    modules = {index: size.make().to(device, size.dtype) for index in held}
    return modules, len(placement(schedule, ranks, per_rank))


class Pipeline:
    """One library's schedule over this rank's modules."""

    def __init__(
        self,
        library: str,
        kind: str,
        schedule: str,
        modules: dict[int, nn.Module],
        num_stages: int,
        size: Size,
        microbatches: int,
    ) -> None:
        if library == "torch":
            from torch.distributed.pipelining import PipelineStage, schedules

            if not devices.nccl_serves(kind, dist.get_world_size()):
                stage_through_the_host()
        else:
            from pp_runtime import PipelineStage, schedules  # type: ignore[assignment]
        # Read when the channels are opened, in the first step.
        self._transport = "c10d" if library == "ours, NCCL" else "auto"
        parameter = next(iter(modules.values())).parameters().__next__()
        device, dtype = parameter.device, parameter.dtype
        group = dist.new_group()  # of its own, so that no library can touch another's messages
        stages = [PipelineStage(module, i, num_stages, device, group=group) for i, module in modules.items()]
        made: Any = schedules.get_schedule_class(schedule)
        self._schedule = made(
            stages[0] if schedule in ONE_STAGE else stages, microbatches, loss_fn=nn.functional.mse_loss
        )
        rows, *rest = size.microbatch
        batch = torch.randn(rows * microbatches, *rest, device=device, dtype=dtype)
        self._args = (batch,) if 0 in modules else ()
        self._target = batch if num_stages - 1 in modules else None

    def step(self) -> None:
        """One step as programs write it, gradients left where they are."""
        os.environ["PP_RUNTIME_TRANSPORT"] = self._transport
        losses: list[torch.Tensor] | None = [] if self._target is not None else None
        self._schedule.step(*self._args, target=self._target, losses=losses, return_outputs=False)
