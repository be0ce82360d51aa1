"""The PyTorch pipelining tutorial's flow on pp_runtime: a small transformer, split by hand or by the tracer.

    torchrun --nproc_per_node 2 examples/tutorial.py --split manual --check
    torchrun --nproc_per_node 2 examples/tutorial.py --split tracer --check

The first rank hands the batch in, the last one the targets; activations and gradients travel by themselves.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pp_runtime import PipelineStage, SplitPoint, pipeline
from pp_runtime.schedules import get_schedule_class


@dataclass(frozen=True)
class ModelArgs:
    """The sizes of the model."""

    dim: int = 64
    n_layers: int = 8
    n_heads: int = 4
    vocab_size: int = 1000


class Transformer(nn.Module):
    """A decoder whose parts may be absent, so that a stage is this model with something deleted."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        # A dict keeps a layer's name, and so its parameters' names, when other layers are deleted.
        self.layers = nn.ModuleDict(
            {str(i): nn.TransformerDecoderLayer(args.dim, args.n_heads, dropout=0.0) for i in range(args.n_layers)}
        )
        self.norm = nn.LayerNorm(args.dim)
        self.output = nn.Linear(args.dim, args.vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of tokens; in a stage, from and to whatever the neighbours have."""
        h = self.tok_embeddings(tokens) if self.tok_embeddings else tokens
        for layer in self.layers.values():
            h = layer(h, h)
        h = self.norm(h) if self.norm else h
        return self.output(h) if self.output else h


def tokenwise_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy a token."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


def layers_of(stage: int, num_stages: int, n_layers: int) -> range:
    """The layers of a stage: consecutive, as equal in number as they can be."""
    return range(stage * n_layers // num_stages, (stage + 1) * n_layers // num_stages)


def manual_stage(model: Transformer, stage: int, num_stages: int, n_layers: int, device: torch.device) -> PipelineStage:
    """Make the whole model this stage by deleting what other stages hold."""
    for i in set(range(n_layers)) - set(layers_of(stage, num_stages, n_layers)):
        del model.layers[str(i)]
    if stage > 0:
        model.tok_embeddings = None
    if stage < num_stages - 1:
        model.norm = None
        model.output = None
    return PipelineStage(model, stage, num_stages, device)


def traced_stage(
    model: Transformer, stage: int, num_stages: int, n_layers: int, device: torch.device, example: torch.Tensor
) -> PipelineStage:
    """Let the tracer cut the model; it runs one microbatch's worth of fake tensors through it."""
    cuts = [layers_of(i, num_stages, n_layers).start for i in range(1, num_stages)]
    pipe = pipeline(
        module=model,
        mb_args=(example,),
        split_spec={f"layers.{cut}": SplitPoint.BEGINNING for cut in cuts},
    )
    return pipe.build_stage(stage, device, dist.group.WORLD)


def check(
    stage: PipelineStage,
    whole: Transformer,
    microbatches: list[tuple[torch.Tensor, torch.Tensor]],
    losses: list[torch.Tensor],
) -> None:
    """Compare this rank's gradients, and on the last rank the losses, with those of the unsplit model."""
    expected = [tokenwise_loss(whole(a), b) for a, b in microbatches]
    (sum(expected) / len(expected)).backward()
    if stage.is_last:
        torch.testing.assert_close(torch.stack(losses).squeeze(), torch.stack(expected).detach().squeeze())
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in stage.submod.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")
    count = len(list(stage.submod.parameters()))
    print(f"rank {dist.get_rank()}: {count} gradients equal those of the unsplit model", flush=True)


def main(flags: argparse.Namespace) -> None:
    """Train one step over all ranks."""
    if "RANK" not in os.environ:
        raise SystemExit("Start this with torchrun: torchrun --nproc_per_node 2 examples/tutorial.py")
    rank, world, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), flags.microbatches
    device = torch.device("cpu")
    if flags.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # The same seed on every rank: each makes the same whole model and the same batch, and keeps its share.
    torch.manual_seed(0)
    args = ModelArgs(flags.dim, flags.layers, flags.heads, flags.vocab)
    with device:
        model, whole = Transformer(args), Transformer(args)
        x = torch.randint(0, args.vocab_size, (flags.batch, flags.seq))
        y = torch.randint(0, args.vocab_size, (flags.batch, flags.seq))
    whole.load_state_dict(model.state_dict())

    if flags.split == "manual":
        stage = manual_stage(model, rank, world, args.n_layers, device)
    else:
        stage = traced_stage(model, rank, world, args.n_layers, device, x.tensor_split(n)[0])
    schedule = get_schedule_class(flags.schedule)(stage, n, loss_fn=tokenwise_loss)

    losses: list[torch.Tensor] = []
    if world == 1:
        schedule.step(x, target=y, losses=losses)
    elif stage.is_first:
        schedule.step(x)
    elif stage.is_last:
        schedule.step(target=y, losses=losses)
    else:
        schedule.step()

    if stage.is_last:
        print("losses: " + " ".join(f"{loss.item():.4f}" for loss in losses), flush=True)
    if flags.check:
        check(stage, whole, list(zip(x.tensor_split(n), y.tensor_split(n), strict=True)), losses)
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("manual", "tracer"), default="manual")
    parser.add_argument("--schedule", choices=("GPipe", "1F1B"), default="GPipe")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=32)
    parser.add_argument("--dim", type=int, default=ModelArgs.dim)
    parser.add_argument("--layers", type=int, default=ModelArgs.n_layers)
    parser.add_argument("--heads", type=int, default=ModelArgs.n_heads)
    parser.add_argument("--vocab", type=int, default=ModelArgs.vocab_size)
    parser.add_argument("--check", action="store_true", help="compare losses and gradients with the unsplit model")
    enough = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if enough else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_flags())
