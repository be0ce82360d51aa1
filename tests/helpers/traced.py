"""Models for the tracer: Hugging Face ones from small configurations with random weights, and one with long skips."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import api
from tests.helpers.reference import Batch

TOKENS, WIDTH, LAYERS, LENGTH = 19, 8, 4, 5


class Logits(nn.Module):
    """Takes tokens and a mask of the real ones by keyword, gives the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=attention_mask, return_dict=False)[0]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=TOKENS, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=2, use_cache=False,
                tie_word_embeddings=False,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return Logits(
        BertForMaskedLM(
            BertConfig(
                vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
                tie_word_embeddings=False,
                intermediate_size=2 * WIDTH, max_position_embeddings=LENGTH,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )
    )  # fmt: skip


class LongSkips(nn.Module):
    """A small U-net: what layer ``i`` makes is needed again by layer ``n - 1 - i``; the input by the last one too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        made: list[Tensor] = []
        value = x
        for index, layer in enumerate(self.layers):
            if index >= LAYERS // 2:
                value = value + made[LAYERS - 1 - index]
            value = torch.tanh(layer(value))
            made.append(value)
        return value + x * attention_mask


SPLITS = {"gpt2": "model.transformer.h.{}", "bert": "model.bert.encoder.layer.{}", "skips": "layers.{}"}
_MODELS = {"gpt2": gpt2, "bert": bert, "skips": LongSkips}


def build(name: str) -> nn.Module:
    torch.manual_seed(4321)
    return _MODELS[name]()


def batch(name: str, rows: int, step: int) -> Batch:
    """Inputs and what the loss compares with; the mask leaves out the last token of every other row."""
    generator = torch.Generator().manual_seed(step)
    if name == "skips":
        inputs = torch.randn(rows, WIDTH, generator=generator)
        return Batch((inputs, torch.linspace(0, 1, rows)[:, None]), torch.randn(rows, WIDTH, generator=generator))
    tokens = torch.randint(TOKENS, (rows, LENGTH), generator=generator)
    mask = torch.ones(rows, LENGTH, dtype=torch.int64)
    mask[::2, -1] = 0
    return Batch((tokens, mask), torch.randint(TOKENS, (rows, LENGTH), generator=generator))


def loss_of(name: str, output: Tensor, target: Tensor) -> Tensor:
    if name == "skips":
        return nn.functional.mse_loss(output, target)
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


@functools.lru_cache
def trace(name: str, num_stages: int, keyword: bool = False) -> Any:
    """The model's Pipe, cut into stages of equally many layers; ``keyword`` says how the mask is passed."""
    inputs, mask = batch(name, 2, 0).args
    begin = api.SplitPoint.BEGINNING
    split = {SPLITS[name].format(index * LAYERS // num_stages): begin for index in range(1, num_stages)}
    args, kwargs = ((inputs,), {"attention_mask": mask}) if keyword else ((inputs, mask), {})
    return api.pipeline(build(name), mb_args=args, mb_kwargs=kwargs, split_spec=split)


def warm() -> None:
    """Trace in the fork server what the tests share: importing transformers and tracing take seconds."""
    for name in SPLITS:
        for num_stages in (2, 4):
            trace(name, num_stages)
