"""Fine-tune a Hugging Face Llama with pipeline parallelism: a frozen base, and low-rank changes of it that are learnt.

    torchrun --nproc_per_node 2 examples/finetune_hf.py --check
    torchrun --nproc_per_node 2 examples/finetune_hf.py --schedule ZBVZeroBubble --steps 40

The model is a small one from a configuration, with random weights, so nothing is downloaded. It needs transformers,
whose code is used as it is.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from pp_runtime import BuiltPipeline, build_pipeline

VOCABULARY = 64
CHANGED = ("q_proj", "v_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """A linear layer that stays as it is and a change of low rank, 0 at first: LoRA (Hu et al., arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


def make_model(layers: int, lora_rank: int) -> nn.Module:
    """The same on every rank: a frozen Llama, some of whose linear layers can be changed."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,  # what a pipeline cannot send along
        )
    )
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in CHANGED and isinstance(layer, nn.Linear):
                setattr(parent, name, LowRank(layer, lora_rank, scale=2.0))
    return model


def make_batch(step: int, rows: int, length: int) -> Tensor:
    """Sequences whose every token follows from the one before: the next is five times as much and one, round 64."""
    tokens = [torch.randint(VOCABULARY, (rows,), generator=torch.Generator().manual_seed(step))]
    for _ in range(length - 1):
        tokens.append((5 * tokens[-1] + 1) % VOCABULARY)
    return torch.stack(tokens, dim=1)


def next_token_loss(output: CausalLMOutputWithPast, tokens: Tensor) -> Tensor:
    """The mean cross entropy of each token after the first."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_of(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Of what learns: the base has no gradients, and no moments that take memory."""
    return torch.optim.AdamW([each for each in parameters if each.requires_grad], lr=rate)


def train(pipeline: BuiltPipeline, flags: argparse.Namespace) -> list[float]:
    """The losses, on the rank of the last stage."""
    optimizer = optimizer_of(pipeline.parameters(), flags.rate)
    means = []
    for step in range(flags.steps):
        tokens = make_batch(step, flags.batch, flags.length)
        losses: list[Tensor] = []
        pipeline.step(tokens, target=tokens, losses=losses, return_outputs=False)
        pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if losses:
            means.append(torch.stack(losses).mean().item())
    return means


def train_unsplit(model: nn.Module, flags: argparse.Namespace) -> list[float]:
    """The same without a pipeline."""
    optimizer = optimizer_of(model.parameters(), flags.rate)
    means = []
    for step in range(flags.steps):
        parts = make_batch(step, flags.batch, flags.length).tensor_split(flags.microbatches)
        losses = [next_token_loss(model(part), part) for part in parts]
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means.append(torch.stack(losses).mean().item())
    return means


def check(pipeline: BuiltPipeline, losses: list[float], unsplit: nn.Module, flags: argparse.Namespace) -> None:
    """Compare with the unsplit model's training; raises AssertionError where something differs."""
    began = copy.deepcopy(unsplit.state_dict())
    expected = train_unsplit(unsplit, flags)
    if pipeline.holds_last:
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
        if losses[-1] >= losses[0]:
            raise AssertionError(f"the loss did not fall: it went from {losses[0]:.4f} to {losses[-1]:.4f}")
    trained = dict(unsplit.named_parameters())
    for name, value in pipeline.named_parameters():
        wanted, tolerance = (trained[name], 1e-4) if value.requires_grad else (began[name], 0.0)
        torch.testing.assert_close(
            value, wanted, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    print(f"rank {dist.get_rank()}: equals the unsplit model's training, and the base is as it was", flush=True)


def main(flags: argparse.Namespace) -> None:
    """Make the model, cut it, train it, and say what it gave."""
    if "RANK" not in os.environ:
        raise SystemExit("Start this with torchrun: torchrun --nproc_per_node 2 examples/finetune_hf.py")
    dist.init_process_group("gloo")
    model = make_model(flags.layers, flags.lora_rank)
    unsplit = copy.deepcopy(model)
    pipeline = build_pipeline(
        model,
        flags.schedule,
        microbatches=flags.microbatches,
        loss_fn=next_token_loss,
        example=(make_batch(0, 1, flags.length),),
    )
    losses = train(pipeline, flags)
    if pipeline.holds_last:
        learns = sum(each.numel() for each in unsplit.parameters() if each.requires_grad)
        of = sum(each.numel() for each in unsplit.parameters())
        print(f"{pipeline.report()}\n{learns:,} of {of:,} parameters learn", flush=True)
        print("losses: " + " ".join(f"{loss:.4f}" for loss in losses), flush=True)
    if flags.check:
        check(pipeline, losses, unsplit, flags)
    dist.destroy_process_group()


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="1F1B")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, over all microbatches")
    parser.add_argument("--length", type=int, default=16, help="tokens in a sequence")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lora-rank", type=int, default=8, help="of the changes")
    parser.add_argument("--rate", type=float, default=1e-2, help="the learning rate")
    parser.add_argument("--check", action="store_true", help="compare with the unsplit model's training")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_flags())
