"""Which rank holds which layers: the model cut into stages, placed as the schedule wants them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pp_runtime import PipelineStage, partition, stages_of_rank
from pp_runtime.orders.catalogue import ORDERS

from .model import LanguageModel, ModelConfig

SCHEDULES = tuple(name for name, spec in ORDERS.items() if not spec.forward_only)


@dataclass(frozen=True)
class Rank:
    """This process: which of how many it is, and what it computes on."""

    index: int
    count: int
    device: torch.device

    @staticmethod
    def join() -> Rank:
        """Join the others that torchrun started: CUDA and NCCL where each has a GPU of its own, else CPU and gloo."""
        if "RANK" not in os.environ:
            raise SystemExit("Start this with torchrun: torchrun --nproc_per_node 2 examples/train_lm.py")
        index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cpu")
        if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return Rank(index, count, device)


def build_stages(rank: Rank, schedule: str, stages_per_rank: int | None, config: ModelConfig) -> list[PipelineStage]:
    """This rank's stages with initialised parameters; without a wish, as many as the schedule takes, 2 where any."""
    spec = ORDERS[schedule]
    if stages_per_rank is None:
        stages_per_rank = spec.stages_per_rank_allowed[0] if spec.stages_per_rank_allowed else 2
    count = rank.count * stages_per_rank
    if count > config.layers:
        raise SystemExit(f"{config.layers} layers are too few for {count} stages; give --layers {count} or more.")
    layers_of = partition([1.0] * config.layers, count).ranges
    stages = []
    for index in stages_of_rank(schedule, rank.index, rank.count, count):
        module = LanguageModel(config, layers_of[index].start, layers_of[index].stop)
        module.initialise(seed=0, layers=config.layers)
        stages.append(PipelineStage(module.to(rank.device), index, count, rank.device))
    return stages
