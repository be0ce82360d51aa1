"""Runs a model's backward whole by torch and split by us, and compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from pp_runtime._backward import stage_backward_input, stage_backward_weight


@dataclass
class Gradients:
    inputs: list[torch.Tensor | None]
    weights: dict[str, torch.Tensor | None]


def tensors_of(output: Any) -> list[torch.Tensor]:
    return [part for part in tree_flatten(output)[0] if isinstance(part, torch.Tensor)]


def fresh(inputs: Sequence[Any]) -> list[Any]:
    """Inputs as a stage gets them: with a graph of their own."""
    return [
        part.detach().clone().requires_grad_(part.requires_grad) if isinstance(part, torch.Tensor) else part
        for part in inputs
    ]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def whole(model: nn.Module, inputs: Sequence[Any], gradients: Sequence[torch.Tensor | None] | None = None) -> Gradients:
    model.zero_grad()
    inputs = fresh(inputs)
    outputs = tensors_of(model(*inputs))
    if gradients is None:
        gradients = [torch.ones_like(output) for output in outputs]
    roots = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
    torch.autograd.backward([o for o, _ in roots], [g for _, g in roots])
    return Gradients([part.grad if isinstance(part, torch.Tensor) else None for part in inputs], weights_of(model))


def split(model: nn.Module, inputs: Sequence[Any], gradients: Sequence[torch.Tensor | None] | None = None) -> Gradients:
    model.zero_grad()
    inputs = fresh(inputs)
    outputs = tensors_of(model(*inputs))
    found, groups = stage_backward_input(outputs, gradients, inputs, model.parameters())
    stage_backward_weight(model.parameters(), groups)
    return Gradients(list(found), weights_of(model))


def assert_same(left: Gradients, right: Gradients, *, exact: bool = True) -> None:
    pairs = list(zip(left.inputs, right.inputs, strict=True))
    pairs += [(left.weights[name], right.weights[name]) for name in left.weights]
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exact else {}))


def assert_split_is_whole(model: nn.Module, *inputs: Any, exact: bool = True, **options: Any) -> None:
    assert_same(whole(model, inputs, **options), split(model, inputs, **options), exact=exact)
