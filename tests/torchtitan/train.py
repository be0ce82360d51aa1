"""One rank of a list of torchtitan trainings, one after another; run.py starts it with torchrun.

A run that raises ends the process, so that no rank waits for it; run.py starts again with the runs after it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu
import torch
import torch.distributed as dist
from matrix import ROWS, SEQUENCE, Run
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

cpu.use_cpu()

import torchtitan  # noqa: E402
from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402


def dataloader(*, dp_rank: int, dp_world_size: int, batch_size: int, **saved: Any) -> ParallelAwareDataloader:
    rows = cpu.RandomRows(dp_rank, dp_world_size)
    return ParallelAwareDataloader(rows, dp_rank, dp_world_size, batch_size=batch_size, **saved)


def trainer_0_2(run: Run, folder: Path) -> Any:
    """torchtitan 0.2: one JobConfig, components from the model's TrainSpec."""
    from torchtitan.config import JobConfig
    from torchtitan.protocols import train_spec
    from torchtitan.train import Trainer

    config = JobConfig()
    config.job.dump_folder = str(folder)
    config.training.local_batch_size = run.rows
    config.training.global_batch_size = ROWS
    config.training.seq_len = SEQUENCE
    config.training.steps = run.steps
    config.training.mixed_precision_param = "float32"
    config.lr_scheduler.warmup_steps = 1
    config.optimizer.implementation = "foreach"
    config.activation_checkpoint.mode = run.recompute
    config.activation_checkpoint.selective_ac_option = "op"
    # DualPipeV's two threads would use one group for the tensor-parallel collectives of both, in an order that differs
    # from rank to rank, and wait for each other without end.
    config.parallelism.pipeline_parallel_expert_parallel_overlap = run.tensor_parallel == 1
    _set_common(config, run)

    spec = train_spec.get_train_spec("llama3")
    spec = dataclasses.replace(
        spec,
        build_tokenizer_fn=None,
        build_dataloader_fn=lambda *, dp_world_size, dp_rank, tokenizer, job_config: dataloader(
            dp_rank=dp_rank, dp_world_size=dp_world_size, batch_size=job_config.training.local_batch_size
        ),
    )
    train_spec.get_train_spec = lambda name: spec
    return Trainer(config)


class Builds:
    """Stands for a component's config in 0.3: torchtitan calls its ``build``."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build


def trainer_0_3(run: Run, folder: Path) -> Any:
    """torchtitan 0.3: a Trainer.Config of the components' configs."""
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import config_registry

    config = config_registry.llama3_debugmodel()
    # Attention without a mask of documents: flex attention has no backward on the CPU.
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.dump_folder = str(folder)
    if not run.chunked_loss:
        config.loss = config.loss.loss_fn
    config.training.local_batch_size = run.rows
    config.training.global_batch_size = ROWS
    config.training.seq_len = SEQUENCE
    config.training.steps = run.steps
    config.training.mixed_precision_param = "float32"
    config.training.disable_cuda_graphs = True
    config.debug.enable_structured_logging = False
    config.lr_scheduler.warmup_steps = 1
    config.activation_checkpoint = {"none": None, "full": FullAC.Config(), "selective": SelectiveAC.Config()}[
        run.recompute
    ]
    if run.ranks > run.pipeline_parallel:
        # The default, spmd_types, needs a newer FSDP than torch 2.13's where a stage has several ranks.
        config.parallelism.spmd_backend = run.backend
    config.tokenizer = Builds(lambda **_: None)
    config.dataloader = Builds(
        lambda *, dp_world_size, dp_rank, local_batch_size, snapshot_every_n_steps, **_: dataloader(
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )
    )
    _set_common(config, run)
    return config.build()


def _set_common(config: Any, run: Run) -> None:
    config.metrics.log_freq = 1
    config.parallelism.pipeline_parallel_degree = run.pipeline_parallel
    config.parallelism.pipeline_parallel_schedule = run.schedule
    config.parallelism.data_parallel_shard_degree = run.data_parallel
    config.parallelism.data_parallel_replicate_degree = run.replicas
    config.parallelism.tensor_parallel_degree = run.tensor_parallel
    config.compile.enable = run.compiled
    config.compile.backend = "aot_eager"
    config.checkpoint.enable = run.checkpoint != "none"
    config.checkpoint.interval = 2
    config.checkpoint.last_save_model_only = False
    if run.checkpoint == "resumed":
        config.checkpoint.load_step = 2


def train(run: Run, version: str, folder: Path) -> dict[str, Any]:
    """Losses and gradient norms of one run, as torchtitan logs them."""
    begun = time.perf_counter()
    trainer = (trainer_0_3 if version.startswith("0.3") else trainer_0_2)(run, folder)
    for part in trainer.model_parts:
        cpu.initialize(part)
    logged: list[tuple[int, float, float]] = []
    trainer.metrics_processor.log = lambda step, average, largest, norm, **_: logged.append((step, average, norm))
    trainer.train()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, logged if getattr(trainer, "pp_has_last_stage", True) else None)
    last = [each for each in everyone if each is not None]
    assert all(each == last[0] for each in last), f"ranks logged different numbers: {last}"
    trainer.close()
    return {"logged": last[0], "seconds": time.perf_counter() - begun}


def _write(work: Path, result: dict[str, Any]) -> None:
    with (work / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def main() -> None:
    work, version = Path(sys.argv[1]), sys.argv[2]
    plan = json.loads((work / "plan.json").read_text())
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    make_group = dist.init_process_group
    print(f"torchtitan from {torchtitan.__file__}") if rank == 0 else None
    for number, each in enumerate(plan):
        run = Run(**each)
        # Each run has keys of its own in torchrun's store, and finds none of the run before it.
        dist.init_process_group = functools.partial(
            make_group, store=dist.PrefixStore(f"run {number}", store), rank=rank, world_size=ranks
        )
        try:
            result = train(run, version, work / "dumps" / run.folder())
        except BaseException as error:
            traceback.print_exc()
            with (work / "results.jsonl").open("a") as file:
                file.write(
                    json.dumps({"name": run.name, "rank": rank, "error": f"{type(error).__name__}: {error}"}) + "\n"
                )
            os._exit(1)
        if rank == 0:
            with (work / "results.jsonl").open("a") as file:
                file.write(json.dumps({"name": run.name, **result}) + "\n")
        dist.barrier()
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds the run's meshes, and the next run's are equal but others
        gc.collect()


if __name__ == "__main__":
    main()
