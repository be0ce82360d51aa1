"""Stages whose backward is hard to split: checkpointed, compiled, recurrent, views, functions of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import WIDTH, Block, Example


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in backward; counts the forwards of its blocks."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant, self.forwards = nn.ModuleList([Block(), Block()]), reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self._run, block, x, use_reentrant=self.reentrant)
        return x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        self.forwards += 1
        return block(x)


def checkpointed(num_stages: int) -> Example:
    return Example([Checkpointed(reentrant=False) for _ in range(num_stages)])


def checkpointed_reentrant(num_stages: int) -> Example:
    """The first stage is a plain one: reentrant checkpoints leave out gradients where the input needs none."""
    return Example([Block(), *(Checkpointed(reentrant=True) for _ in range(num_stages - 1))])


class PartlyCompiled(nn.Module):
    """An eager layer around a compiled block; the compiler's own code generation is left out, for speed."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block, self.after = nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, WIDTH)
        self.block.compile(backend="aot_eager", dynamic=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.before(x)))


def compiled(num_stages: int) -> Example:
    return Example([PartlyCompiled() for _ in range(num_stages)])


class Recurrent(nn.Module):
    """Reads each row as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x[..., None])[0])[..., 0]


def recurrent(num_stages: int) -> Example:
    return Example([Recurrent() for _ in range(num_stages)])


class View(nn.Module):
    """Its output is a view of what a layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH + 2)

    def forward(self, x: Tensor) -> Tensor:
        # A view that is not dense arrives contiguous, and some processors' products sum the two in other orders.
        return self.linear(x.contiguous())[:, 1:-1].unflatten(1, (2, -1)).flatten(1)


def views(num_stages: int) -> Example:
    return Example([View() for _ in range(num_stages)])


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class OwnFunction(nn.Module):
    """A function of the user's own that makes both gradients at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.block = nn.Parameter(torch.rand(WIDTH) + 0.5), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(_Scale.apply(x, self.weight))


def own_functions(num_stages: int) -> Example:
    return Example([OwnFunction() for _ in range(num_stages)])


class BothSides(nn.Module):
    """One weight before and after a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x)) * torch.sigmoid(self.gate(x))
        return self.linear(hidden) + x


def both_sides(num_stages: int) -> Example:
    return Example([BothSides() for _ in range(num_stages)])


MODELS: dict[str, Callable[[int], Example]] = {
    model.__name__: model
    for model in (
        checkpointed, checkpointed_reentrant, compiled, recurrent, views, own_functions, both_sides,
    )
}  # fmt: skip
