"""The language model of benchmarks: an embedding, equal transformer blocks, a head over the vocabulary."""

from __future__ import annotations

from torch import Tensor, nn

from compiled import Block


class LanguageModel(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, blocks: int, width: int, heads: int, vocabulary: int, *, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The mean cross entropy of every token."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
