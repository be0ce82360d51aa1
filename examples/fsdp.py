"""Pipeline and data parallelism together: a mesh of pipeline x data, each stage sharded by FSDP2.

    torchrun --nproc_per_node 4 examples/fsdp.py --check
    torchrun --nproc_per_node 4 examples/fsdp.py --schedule ZBVZeroBubble --steps 20

               data 0     data 1
    pipe 0     rank 0     rank 1      the first half of the layers, each rank with half of every parameter
    pipe 1     rank 2     rank 3      the second half

Each column is a pipeline and trains on its own half of the batch. The ranks of a row gather a stage's parameters from
one another when it runs, and add up its gradients.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lm.model import Block, LanguageModel, ModelConfig, token_loss
from lm.text import VOCABULARY, Corpus
from pp_runtime import BuiltPipeline, build_pipeline


def build(flags: argparse.Namespace, model: nn.Module, mesh: DeviceMesh) -> BuiltPipeline:
    """This rank's stages: cut along the mesh's one axis, sharded along the other."""

    def shard(stage: nn.Module) -> nn.Module:
        for block in stage.modules():
            if isinstance(block, Block):
                fully_shard(block, mesh=mesh["data"])
        return fully_shard(stage, mesh=mesh["data"])

    return build_pipeline(
        model,
        flags.schedule,
        microbatches=flags.microbatches,
        loss_fn=token_loss,
        example=(torch.zeros(1, flags.length, dtype=torch.long),),
        group=mesh,
        axis="pipe",
        parallelize=shard,
    )


def train(pipeline: BuiltPipeline, corpus: Corpus, replica: int, flags: argparse.Namespace) -> list[float]:
    """The mean losses of this replica's half of each batch, on the ranks of the last stage."""
    optimizer = torch.optim.SGD(pipeline.parameters(), flags.rate)
    means = []
    for step in range(flags.steps):
        x, y = (each.chunk(2)[replica] for each in corpus.batch(step, flags.batch, flags.length))
        losses: list[Tensor] = []
        pipeline.step(x, target=y, losses=losses, return_outputs=False)
        pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if losses:
            means.append(torch.stack(losses).mean().item())
    return means


def train_unsplit(model: nn.Module, corpus: Corpus, replica: int, flags: argparse.Namespace) -> list[float]:
    """The same on one process and the whole batch; the losses are those of the replica's half, too."""
    optimizer = torch.optim.SGD(model.parameters(), flags.rate)
    means = []
    for step in range(flags.steps):
        x, y = corpus.batch(step, flags.batch, flags.length)
        halves = [token_loss(model(a), b) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
        torch.stack(halves).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means.append(halves[replica].item())
    return means


def check(
    pipeline: BuiltPipeline, losses: list[float], expected: list[float], trained: dict[str, Tensor], rank: int
) -> None:
    """Compare with the unsplit model's training; raises AssertionError where something differs."""
    if pipeline.holds_last:
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    for name, value in pipeline.named_parameters():
        torch.testing.assert_close(
            value.full_tensor(), trained[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    print(f"rank {rank}: equals the unsplit model's training", flush=True)


def main(flags: argparse.Namespace) -> None:
    """Make the mesh, the model and the pipelines, and train."""
    if os.environ.get("WORLD_SIZE") != "4":
        raise SystemExit("Start this with torchrun on four ranks: torchrun --nproc_per_node 4 examples/fsdp.py")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipe", "data"))
    replica, corpus = mesh["data"].get_local_rank(), Corpus.read(None, 300_000)
    model = LanguageModel(ModelConfig(VOCABULARY, flags.length, flags.width, flags.layers, heads=4))
    model.initialise(seed=0, layers=flags.layers)
    unsplit = copy.deepcopy(model)
    pipeline = build(flags, model, mesh)
    losses = train(pipeline, corpus, replica, flags)
    if pipeline.holds_last and replica == 0:
        print(pipeline.report(), flush=True)
    if pipeline.holds_last:
        print(f"losses of replica {replica}: " + " ".join(f"{loss:.4f}" for loss in losses), flush=True)
    if flags.check:
        expected = train_unsplit(unsplit, corpus, replica, flags)
        check(pipeline, losses, expected, dict(unsplit.named_parameters()), dist.get_rank())
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="1F1B")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, over both replicas")
    parser.add_argument("--length", type=int, default=32, help="tokens in a sequence")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.5, help="the learning rate")
    parser.add_argument("--check", action="store_true", help="compare with the unsplit model's training")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_flags())
