"""The model, the batches, the loss and the check that every program of this folder has in common.

The programs make a small Llama of transformers (4 layers of width 64), the same on every rank, train it for three steps
of SGD in microbatches, and are compared with the unsplit model: the losses, and all parameters at the end. Options:

    --tied              the embedding is the head, too
    --microbatches N    4, unless said
    --rows N            sequences in a batch; 8, unless said
    --family NAME       another model: Gemma2, Granite, Mistral, Qwen3, ... where the program is not for Llama alone
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

_parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
_parser.add_argument("--tied", action="store_true")
_parser.add_argument("--microbatches", type=int, default=4)
_parser.add_argument("--rows", type=int, default=8)
_parser.add_argument("--family", default="Llama")
_flags = _parser.parse_args()

STEPS, LENGTH, RATE = 3, 16, 0.1
MICROBATCHES, ROWS = _flags.microbatches, _flags.rows
_OF_FAMILY = {
    "Gemma2": {"head_dim": 16, "sliding_window": 4},
    "Granite": {"logits_scaling": 8.0},
    "Mistral": {"sliding_window": 4},
    "Qwen3": {"head_dim": 16},
}
CONFIG = getattr(transformers, f"{_flags.family}Config")(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=_flags.tied,
    use_cache=False,
    **_OF_FAMILY.get(_flags.family, {}),
)


def make_model() -> nn.Module:
    """The same on every rank."""
    torch.manual_seed(0)
    return getattr(transformers, f"{_flags.family}ForCausalLM")(CONFIG)


def make_batch(step: int) -> Tensor:
    """Tokens, ``[ROWS, LENGTH]``, of which each is the target of those before it."""
    return torch.randint(CONFIG.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross entropy of every token after the first."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train_unsplit(model: nn.Module) -> list[Tensor]:
    """The mean loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    means = []
    for step in range(STEPS):
        parts = make_batch(step).tensor_split(MICROBATCHES)
        losses = [loss_of(model(part).logits, part) for part in parts]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(torch.stack(losses).mean().detach())
    return means


def compare(losses: Sequence[Tensor], trained: Iterable[tuple[str, Tensor]]) -> None:
    """Say how far losses, where there are any, and parameters are from the unsplit model's of the same names."""
    unsplit = make_model()
    expected = torch.stack(train_unsplit(unsplit))
    parameters = dict(unsplit.named_parameters(remove_duplicate=False))
    began = dict(make_model().named_parameters(remove_duplicate=False))
    furthest, moved, seen = 0.0, 0.0, 0
    for name, value in trained:
        furthest = max(furthest, (value - parameters[name]).abs().max().item())
        moved = max(moved, (value - began[name]).abs().max().item())
        seen += 1
    said = f"{seen} of {len(parameters)} parameters: off by {furthest:.1e} at most, having moved {moved:.1e}"
    if losses:
        given = torch.stack([torch.as_tensor(each) for each in losses])
        said += f"; losses {[round(each, 4) for each in given.tolist()]}: off by {(given - expected).abs().max():.1e}"
    print(f"{said}\n", end="", flush=True)  # in one write, for the ranks share the output
