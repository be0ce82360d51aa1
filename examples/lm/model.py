"""A decoder-only transformer: a plain model, which knows nothing of pipelines."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of the model."""

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    dropout: float = 0.0


class Block(nn.Module):
    """Causal attention and a feed-forward net, each after a norm and beside a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.projection = nn.Linear(config.width, config.width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, length, width] to the same."""
        rows, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(rows, length, 3 * self.heads, -1).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = self.projection(mixed.transpose(1, 2).reshape(rows, length, width))
        x = x + F.dropout(mixed, self.dropout, self.training)
        fed = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return x + F.dropout(fed, self.dropout, self.training)


class LanguageModel(nn.Module):
    """Embeddings, a row of blocks, and a head. After the blocks only modules are called, so it can be cut as it is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocabulary] of tokens [rows, length]."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def initialise(self, seed: int, layers: int) -> None:
        """Draw every parameter from a generator of its own: the same on every rank, whatever was drawn before."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            deep = name.endswith(("projection.weight", "down.weight"))
            spread = 0.02 if not deep else 0.02 / (2 * layers) ** 0.5
            parameter.copy_(torch.normal(0.0, spread, parameter.shape, generator=generator))


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy a token, in nats."""
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten())
