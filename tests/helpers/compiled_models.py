"""Models for compiled stages: what users compile, in the small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 16


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attention(self.qkv(self.attention_norm(x)), *x.shape))
        return x + self.down(F.silu(self.up(self.norm(x))))

    def attention(self, qkv: Tensor, rows: int, length: int, width: int) -> Tensor:
        q, k, v = qkv.view(rows, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).reshape(rows, length, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ScoredAttention(Transformer):
    """Attention with a score function, as FlexAttention's, written out: its own backward does not run on a CPU."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2])
        distance = positions[:, None] - positions
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 - 0.1 * distance
        return scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.norm(self.first(x))))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, 32) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 32, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        chances = self.gate(x).softmax(-1)
        best, chosen = chances.topk(2, -1)
        shares = torch.zeros_like(chances).scatter(-1, chosen, best)
        made = torch.einsum("ebf,efd->ebd", torch.einsum("bd,edf->ebf", x, self.up).relu(), self.down)
        return x + torch.einsum("ebd,be->bd", made, shares)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0]
        for time in range(1, x.shape[1]):
            state = self.cell(x[:, time], state)
        return state


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Transformer(), Layers()

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        return checkpoint(self.second, x, use_reentrant=False)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class CheckpointedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)


class OneWeightTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight.t()) + self.layer(x)


class Aliases(nn.Module):
    """Returns the same values twice, changes them in place, and gives back a view of what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.layer(x)
        y.add_(1)
        return y, y.view(-1), x.t()


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.layer(x + self.table(tokens))


class Norms(nn.Module):
    """No product: nothing that W could do later."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.norm(x) * self.scale, (WIDTH,))


class ManyNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.groups, self.layer = nn.GroupNorm(4, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x).tanh()
        return self.groups(self.layer(x))


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Transformer()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.block(F.dropout(x, 0.3)), 0.3)


class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Transformer()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(x)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


CUT: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "transformer": (Transformer, lambda: (random(2, 5, WIDTH),)),
    "scored attention": (ScoredAttention, lambda: (random(2, 5, WIDTH),)),
    "convolutions": (Convolutions, lambda: (random(2, 3, 6, 6),)),
    "experts": (Experts, lambda: (random(6, WIDTH),)),
    "recurrent": (Recurrent, lambda: (random(2, 4, WIDTH),)),
    "checkpointed": (Checkpointed, lambda: (random(2, 5, WIDTH),)),
    "one weight twice": (OneWeightTwice, lambda: (random(4, WIDTH),)),
    "aliases": (Aliases, lambda: (random(4, WIDTH),)),
    "embedding": (Embedding, lambda: (random(4, WIDTH), torch.tensor([1, 2, 3, 1]))),
    "many norms": (ManyNorms, lambda: (random(4, WIDTH),)),
    "dropout": (Dropout, lambda: (random(2, 5, WIDTH),)),
    "half precision": (HalfPrecision, lambda: (random(2, 5, WIDTH),)),
}
