"""Small models cut in stages, one a way in which stages differ, each with batches to train it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import api
from tests.helpers.reference import Batch

WIDTH = 4


@dataclass(frozen=True)
class Example:
    """A model of ``len(stages)`` stages, its loss, and ``batch(rows, step)``; equal on every rank."""

    stages: list[nn.Module]
    batch: Callable[[int, int], Batch] = lambda rows, step: rows_of_floats(rows, step)
    loss_fn: Callable[..., Tensor] = lambda output, target: F.mse_loss(output, target)
    exact: bool = True  # False where cutting the graph at stages adds the same numbers in another order


def build(make: Callable[[int], Example], num_stages: int) -> Example:
    """The same model on every rank."""
    torch.manual_seed(1234)
    return make(num_stages)


def rows_of_floats(rows: int, step: int, width: int = WIDTH) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch((torch.randn(rows, width, generator=generator),), torch.randn(rows, width, generator=generator))


class Block(nn.Sequential):
    """Linear and tanh."""

    def __init__(self, inputs: int = WIDTH, outputs: int = WIDTH) -> None:
        super().__init__(nn.Linear(inputs, outputs), nn.Tanh())


class Keeps(nn.Module):
    """A stage that keeps what it receives for longer than the step, each with a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append((x.detach(), x.detach().clone()))
        return self.linear(x)


def mlp(num_stages: int) -> Example:
    return Example([Block() for _ in range(num_stages)])


def uneven(num_stages: int) -> Example:
    """Stages of different depth, boundaries of different width."""
    widths = [WIDTH, *(3 + index % 3 for index in range(num_stages - 1)), WIDTH]
    depths = [1 + index % 3 for index in range(num_stages)]
    return Example(
        [
            nn.Sequential(Block(widths[i], widths[i + 1]), *(Block(widths[i + 1], widths[i + 1]) for _ in range(depth)))
            for i, depth in enumerate(depths)
        ]
    )


class Pair(nn.Module):
    """Takes one or two tensors, gives two of different shapes; the last gives one."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), last
        self.back = nn.Linear(3, WIDTH)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.tanh(self.first(x) if y is None else self.first(x) * self.back(y))
        return x if self.last else (x, self.second(x))


def tuples(num_stages: int) -> Example:
    return Example([Pair(last=index == num_stages - 1) for index in range(num_stages)], exact=False)


class Masked(nn.Module):
    """Passes activations, an integer index and an expanded boolean mask on; only the first can have gradients."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.block, self.first, self.last = Block(), first, last

    def forward(self, x: Tensor, index: Tensor | None = None, mask: Tensor | None = None) -> object:
        if self.first:
            index = torch.arange(x.shape[0], device=x.device) % WIDTH
            mask = (torch.arange(WIDTH, device=x.device) > 0).expand(x.shape[0], WIDTH)
        x = self.block(x).masked_fill(~mask, 0.5) + index[:, None]
        return x if self.last else (x, index, mask)


def masks(num_stages: int) -> Example:
    return Example([Masked(index == 0, index == num_stages - 1) for index in range(num_stages)])


class Transposed(nn.Module):
    """Gives a transposed view on, so that what crosses the boundary is not contiguous."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.linear, self.first, self.last = nn.Linear(WIDTH, WIDTH), first, last

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x if self.first else x.transpose(0, 1)))
        return x if self.last else x.transpose(0, 1)


def transposed(num_stages: int) -> Example:
    """What arrives may have other strides than what was sent, and is then rounded otherwise."""
    return Example([Transposed(index == 0, index == num_stages - 1) for index in range(num_stages)], exact=False)


class WithKwargs(nn.Module):
    """Every stage takes a tensor that is split by rows and a number that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, *, scale: Tensor, power: int) -> Tensor:
        return self.block(x) * scale**power


def kwargs(num_stages: int) -> Example:
    def batch(rows: int, step: int) -> Batch:
        plain = rows_of_floats(rows, step)
        return Batch(plain.args, plain.target, {"scale": torch.linspace(0.5, 1.5, rows)[:, None], "power": 2})

    return Example([WithKwargs() for _ in range(num_stages)], batch)


class SeededDropout(nn.Module):
    """Dropout seeded by stage and count of forwards, so that any rank draws what the plain model does."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.block, self.seed, self.calls = Block(), stage * 10_000, 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.training:
            torch.manual_seed(self.seed + self.calls)
            self.calls += 1
        return F.dropout(self.block(x), 0.3, self.training)


def dropout(num_stages: int) -> Example:
    return Example([SeededDropout(index) for index in range(num_stages)])


def frozen(num_stages: int) -> Example:
    """The first stage has nothing to learn, the others a frozen bias: the second stage's input needs no gradient."""
    stages = [Block() for _ in range(num_stages)]
    for index, stage in enumerate(stages):
        stage[0].bias.requires_grad_(False)
        stage[0].weight.requires_grad_(index > 0 or num_stages == 1)
    return Example(list(stages))


def no_parameters(num_stages: int) -> Example:
    """Every second stage has no parameters."""
    return Example([Block() if index % 2 == 0 else nn.Tanh() for index in range(num_stages)])


class Shared(nn.Module):
    """One weight used twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.tanh(self.linear(x))))


def shared(num_stages: int) -> Example:
    return Example([Shared() for _ in range(num_stages)])


class Normed(nn.Module):
    """Convolution and batch norm: what a batch's statistics do depends on which microbatches were seen."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.conv, self.norm = (
            nn.Conv1d(1 if first else 2, 1 if last else 2, 3, padding=1),
            nn.BatchNorm1d(1 if last else 2),
        )
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x[:, None] if self.first else x)))
        return x[:, 0] if self.last else x


def norms(num_stages: int) -> Example:
    return Example([Normed(index == 0, index == num_stages - 1) for index in range(num_stages)])


class Attention(nn.Module):
    """A pre-norm transformer block; tokens come in at the first stage, logits leave at the last."""

    TOKENS, WIDTH, LENGTH = 11, 8, 5

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        width = self.WIDTH
        self.embed = nn.Embedding(self.TOKENS, width) if first else None
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, self.TOKENS) if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        x = x + self.mlp(self.after(x))
        return x if self.head is None else self.head(x)


def transformer(num_stages: int) -> Example:
    def batch(rows: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(Attention.TOKENS, (rows, Attention.LENGTH + 1), generator=generator)
        return Batch((tokens[:, :-1],), tokens[:, 1:])

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    return Example([Attention(index == 0, index == num_stages - 1) for index in range(num_stages)], batch, loss)


class InPlace(nn.Module):
    """Changes its input in place before using it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(WIDTH, WIDTH), first

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(x if self.first else x.mul_(1.5)))


def in_place(num_stages: int) -> Example:
    return Example([InPlace(first=index == 0) for index in range(num_stages)])


class Routed(nn.Module):
    """Of two experts, the one that a microbatch's first value asks for: the other gets no gradient from it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x.detach().sum() > 0)](x)


def routed(num_stages: int) -> Example:
    return Example([Routed() for _ in range(num_stages)])


class Untouched(nn.Module):
    """Hands its input on unchanged beside what it makes of it; the first output of the stage is its input itself."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.block, self.last = Block(), last

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        made = self.block(x if y is None else y)
        return x + made if self.last else (x, made)


def untouched(num_stages: int) -> Example:
    return Example([Untouched(last=index == num_stages - 1) for index in range(num_stages)], exact=False)


# torch sends contiguous tensors only, and runs a hidden forward at the first step.
_TORCH_CANNOT = {"masks", "transposed", "in_place", "norms", "dropout"}


def usable(names: Iterable[str] = ()) -> list[str]:
    """Of these models, or of all, the ones that the API under test can run."""
    return [name for name in names or sorted(MODELS) if not (api.IS_TORCH and name in _TORCH_CANNOT)]


class Embeds(nn.Module):
    """The first stage of a model whose head is its embedding."""

    def __init__(self, words: int = 7, width: int = 6) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(words, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.embedding(tokens))


class Reads(nn.Module):
    """The last one."""

    def __init__(self, words: int = 7, width: int = 6) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(width, width), nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))


MODELS: dict[str, Callable[[int], Example]] = {
    model.__name__: model
    for model in (
        mlp, uneven, tuples, masks, transposed, kwargs, dropout, frozen, no_parameters, shared, norms, transformer,
        in_place, routed, untouched,
    )
}  # fmt: skip
