"""Hugging Face models whose layers stand in a row, from small configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

TOKENS, LAYERS, LENGTH = 50, 5, 7
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
}  # fmt: skip


def _make(name: str, head: str, **config: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}{head}")(made)


def _decoder(name: str, **more: Any) -> nn.Module:
    return _make(name, "ForCausalLM", vocab_size=TOKENS, num_key_value_heads=2, use_cache=False, **SIZES, **more)


def _gpt2() -> nn.Module:
    return _make(
        "GPT2", "LMHeadModel", vocab_size=TOKENS, n_embd=32, n_layer=LAYERS, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _gemma3() -> nn.Module:
    """Layers of two kinds, which take different masks and rotary tables."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=TOKENS,
            num_key_value_heads=2,
            use_cache=False,
            head_dim=8,
            sliding_window=3,
            sliding_window_pattern=2,
            **SIZES,
        )  # fmt: skip
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: _decoder("Llama"),
    "Llama, tied": lambda: _decoder("Llama", tie_word_embeddings=True),
    "Qwen2": lambda: _decoder("Qwen2"),
    "Qwen3": lambda: _decoder("Qwen3", head_dim=8),
    "Mistral": lambda: _decoder("Mistral"),
    "Mixtral": lambda: _decoder("Mixtral", num_local_experts=2),
    "Gemma": lambda: _decoder("Gemma", head_dim=8),
    "Gemma2": lambda: _decoder("Gemma2", head_dim=8),
    "Gemma3": _gemma3,
    "Phi": lambda: _decoder("Phi"),
    "GPT-2": _gpt2,
    "BERT": lambda: _make("Bert", "Model", vocab_size=TOKENS, **SIZES),
    "BERT with a head": lambda: _make("Bert", "ForMaskedLM", vocab_size=TOKENS, **SIZES),
    "BERT, classes": lambda: _make("Bert", "ForSequenceClassification", vocab_size=TOKENS, **SIZES),
    "ViT": lambda: _make("ViT", "Model", image_size=8, patch_size=4, **SIZES),
    "ViT, classes": lambda: _make("ViT", "ForImageClassification", image_size=8, patch_size=4, **SIZES),
}

REFUSED: dict[str, Callable[[], nn.Module]] = {
    # They look for the last token of each row, which the last stage does not know.
    "Llama, classes": lambda: _make(
        "Llama", "ForSequenceClassification", vocab_size=TOKENS, pad_token_id=0, use_cache=False, **SIZES
    ),
    "GPT-2, classes": lambda: _make(
        "GPT2", "ForSequenceClassification", vocab_size=TOKENS, n_embd=32, n_layer=LAYERS, n_head=4, use_cache=False,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


def inputs_of(name: str, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    if name.startswith("ViT"):
        return torch.randn(rows, 3, 8, 8, generator=generator)
    return torch.randint(TOKENS, (rows, LENGTH), generator=generator)
