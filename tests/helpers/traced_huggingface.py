"""Hugging Face models for the tracer, from small configurations with random weights; all inputs go by name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import api
from tests.helpers.reference import Batch

TOKENS, WIDTH, LAYERS, LENGTH, CLASSES = 19, 8, 4, 5, 3
ROWS = 2  # of a microbatch


class Logits(nn.Module):
    """The logits alone, of a model that returns more. Its inputs stand in another order than the model uses them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, position_ids: Tensor, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=False,
            use_cache=False,
        )[0]


class Translation(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            return_dict=False,
            use_cache=False,
        )[0]


class Classes(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values, return_dict=False)[0]


def _decoder(name: str, tied: bool, **more: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=4 * LENGTH, tie_word_embeddings=tied, **more,
    )  # fmt: skip
    return Logits(getattr(transformers, f"{name}ForCausalLM")(config))


def _gpt2(tied: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS, n_positions=2 * LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied,
    )  # fmt: skip
    return Logits(GPT2LMHeadModel(config))


def _bert(tied: bool) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    class Masked(Logits):
        def forward(self, position_ids: Tensor, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=False
            )[0]

    config = BertConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=2 * WIDTH, max_position_embeddings=2 * LENGTH, tie_word_embeddings=tied,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Masked(BertForMaskedLM(config))


def _t5(tied: bool) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=TOKENS, d_model=WIDTH, d_kv=WIDTH // 2, d_ff=2 * WIDTH, num_layers=2, num_decoder_layers=2,
        num_heads=2, dropout_rate=0.0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    if not tied:  # all three are one, whatever the configuration says
        model.decoder.embed_tokens = copy.deepcopy(model.shared)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return Translation(model)


def _vit(tied: bool) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=2 * WIDTH, image_size=8,
        patch_size=4, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Classes(ViTForImageClassification(config))


@dataclass(frozen=True)
class Kind:
    """How a model is made, and the modules before which it is split into two and into four stages."""

    make: Callable[[bool], nn.Module]
    layers: tuple[str, ...]
    halves: tuple[str, ...]
    quarters: tuple[str, ...]
    exact: bool = True  # not where several stages give an activation its gradient: their sum has another order


def _kind(make: Callable[[bool], nn.Module], layer: str) -> Kind:
    layers = tuple(layer.format(number) for number in range(LAYERS))
    return Kind(make, layers, layers[2:3], layers[1:])


_LLAMA_LIKE = "model.model.layers.{}"
MODELS = {
    "gpt2": _kind(_gpt2, "model.transformer.h.{}"),
    "llama": _kind(functools.partial(_decoder, "Llama"), _LLAMA_LIKE),
    "qwen2": _kind(functools.partial(_decoder, "Qwen2"), _LLAMA_LIKE),
    "mixtral": _kind(functools.partial(_decoder, "Mixtral", num_local_experts=4), _LLAMA_LIKE),
    "bert": _kind(_bert, "model.bert.encoder.layer.{}"),
    "t5": Kind(
        _t5,
        tuple(f"model.{half}.block.{number}" for half in ("encoder", "decoder") for number in range(2)),
        ("model.decoder.block.0",),
        ("model.encoder.block.1", "model.decoder.block.0", "model.decoder.block.1"),
        exact=False,
    ),
    "vit": _kind(_vit, "model.vit.layers.{}"),
}


def build(name: str, tied: bool = False) -> nn.Module:
    torch.manual_seed(4321)
    return MODELS[name].make(tied)


def batch(name: str, rows: int, step: int) -> Batch:
    """Inputs by name, and what the loss compares with; the mask leaves out the first token of every other row."""
    generator = torch.Generator().manual_seed(step)
    if name == "vit":
        pixels = torch.randn(rows, 3, 8, 8, generator=generator)
        return Batch((), torch.randint(CLASSES, (rows,), generator=generator), {"pixel_values": pixels})
    tokens, others, target = (torch.randint(TOKENS, (rows, LENGTH), generator=generator) for _ in range(3))
    mask = torch.ones(rows, LENGTH, dtype=torch.int64)
    mask[::2, 0] = 0
    named = {"attention_mask": mask, "input_ids": tokens}
    if name == "t5":
        return Batch((), target, {**named, "decoder_input_ids": others})
    positions = torch.arange(LENGTH).repeat(rows, 1)
    positions[1::2] += 1
    return Batch((), target, {**named, "position_ids": positions})


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), target.flatten())


@functools.lru_cache
def trace(name: str, num_stages: int) -> Any:
    """The model's Pipe, of two stages or four."""
    kind = MODELS[name]
    split = dict.fromkeys(kind.halves if num_stages == 2 else kind.quarters, api.SplitPoint.BEGINNING)
    return api.pipeline(build(name), mb_args=(), mb_kwargs=dict(batch(name, ROWS, 0).kwargs or {}), split_spec=split)


def warm() -> None:
    """Trace in the fork server what the tests share: importing transformers and tracing take seconds."""
    for name in MODELS:
        for num_stages in (2, 4):
            trace(name, num_stages)
