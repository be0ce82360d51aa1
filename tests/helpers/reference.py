"""The oracle: the unpipelined model over the same microbatches, its sums taken in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """What a step is given: positional and keyword inputs and the target of the whole batch."""

    args: tuple[Any, ...]
    target: Any = None
    kwargs: Mapping[str, Any] | None = None

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on the device."""
        if device.type == "cpu":
            return self
        kwargs = {name: _moved(value, device) for name, value in (self.kwargs or {}).items()}
        return Batch(tuple(_moved(arg, device) for arg in self.args), _moved(self.target, device), kwargs or None)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Outcome:
    """What a step gives back; gradients are on the parameters."""

    outputs: Any
    losses: list[Tensor]


def chunk(value: Any, count: int) -> list[Any]:
    """Split tensors by rows as evenly as can be, the larger chunks first; everything else goes to all microbatches."""
    return list(torch.tensor_split(value, count)) if isinstance(value, Tensor) else [value] * count


def microbatches_of(batch: Batch, count: int) -> list[Batch]:
    args = [chunk(arg, count) for arg in batch.args]
    kwargs = {name: chunk(value, count) for name, value in (batch.kwargs or {}).items()}
    targets = chunk(batch.target, count)
    return [
        Batch(tuple(arg[i] for arg in args), targets[i], {name: value[i] for name, value in kwargs.items()})
        for i in range(count)
    ]


def forward(stages: Sequence[nn.Module], batch: Batch) -> Any:
    """The whole model on one microbatch: each stage's output is the next one's positional input."""
    value: Any = batch.args
    for stage in stages:
        value = stage(*(value if isinstance(value, tuple | list) else (value,)), **(batch.kwargs or {}))
    return value


def merge(outputs: list[Any]) -> Any:
    """The whole batch's output from the microbatches' ones."""
    if isinstance(outputs[0], tuple | list):
        return type(outputs[0])(torch.cat(parts) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs)


def train_step(
    stages: Sequence[nn.Module],
    batch: Batch,
    loss_fn: Callable[..., Tensor],
    microbatches: int,
    backward_orders: Mapping[int, Sequence[int]] | None = None,
    scale: bool = True,
) -> Outcome:
    """Set every parameter's gradient to the (mean) sum over microbatches, each stage adding up in its own order.

    ``backward_orders`` gives the stages whose order is not the ascending one.
    """
    parameters = [list(stage.parameters()) for stage in stages]
    everything = [parameter for group in parameters for parameter in group]
    outputs, losses = [], []
    gradients: list[dict[Tensor, Tensor]] = []
    for microbatch in microbatches_of(batch, microbatches):
        output = forward(stages, microbatch)
        loss = loss_fn(output, microbatch.target)
        _clear(everything)
        if loss.requires_grad:
            loss.backward()
        outputs.append(_detached(output))
        losses.append(loss.detach())
        gradients.append({parameter: parameter.grad for parameter in everything if parameter.grad is not None})
    _clear(everything)
    for index, group in enumerate(parameters):
        for microbatch_index in (backward_orders or {}).get(index, range(microbatches)):
            for parameter in dict.fromkeys(group):
                gradient = gradients[microbatch_index].get(parameter)
                if gradient is not None:
                    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
    if scale:
        for parameter in dict.fromkeys(everything):
            if parameter.grad is not None:
                parameter.grad.div_(microbatches)
    return Outcome(merge(outputs), losses)


def evaluate(
    stages: Sequence[nn.Module], batch: Batch, microbatches: int, loss_fn: Callable[..., Tensor] | None = None
) -> Outcome:
    """Outputs and losses without gradients."""
    with torch.no_grad():
        pieces = microbatches_of(batch, microbatches)
        outputs = [forward(stages, piece) for piece in pieces]
        losses = (
            [loss_fn(output, piece.target) for output, piece in zip(outputs, pieces, strict=True)] if loss_fn else []
        )
    return Outcome(merge(outputs), losses)


def differences(name: str, got: Any, expected: Any, exact: bool = True) -> list[str]:
    """Say where two values (tensors, None or sequences of them) differ, wherever they lie; empty when they do not."""
    if isinstance(expected, tuple | list) and isinstance(got, tuple | list) and len(got) == len(expected):
        pairs = enumerate(zip(got, expected, strict=True))
        return [line for i, (a, b) in pairs for line in differences(f"{name}[{i}]", a, b, exact)]
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        got = got.to(expected.device)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return [f"{name}: {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}"]
        if torch.equal(got, expected) or (not exact and torch.allclose(got, expected, rtol=1e-5, atol=1e-6)):
            return []
        off = (got.double() - expected.double()).abs().max().item()
        return [f"{name}: off by {off:.3g} of {expected.double().abs().max().item():.3g}"]
    return [] if got is None and expected is None else [f"{name}: {_brief(got)}, not {_brief(expected)}"]


def _brief(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _clear(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _detached(value: Any) -> Any:
    return type(value)(part.detach() for part in value) if isinstance(value, tuple | list) else value.detach()
