"""The backward of a stage, whole or split in two, with torch.distributed.pipelining's call forms on the C++ code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import Parameter

from pp_runtime import _C
from pp_runtime.errors import PipelineUsageError


def stage_backward(
    stage_output: Any,
    output_grads: Any,
    input_values: Sequence[Any],
    outputs_with_grads_idxs: list[int] | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Run the whole backward of one microbatch of a stage.

    Gradients are accumulated into every leaf that the outputs depend on.

    Args:
        stage_output: What the stage gave, or the loss: a tensor or a nest of tuples, lists and dicts of tensors.
        output_grads: The outputs' gradients in the same nest, ``None`` where there is none (a scalar's is then one).
        input_values: What went into the stage. Their ``grad`` is taken and cleared.
        outputs_with_grads_idxs: Which outputs take part; all of them when ``None``.

    Returns:
        For each input value its gradient, ``None`` where there is none.
    """
    if outputs_with_grads_idxs is not None:
        stage_output = [stage_output[index] for index in outputs_with_grads_idxs]
        output_grads = [output_grads[index] for index in outputs_with_grads_idxs]
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for output, gradient in _pairs(stage_output, output_grads):
        _add_root(outputs, gradients, output, gradient)
    try:
        _C.full_backward(outputs, gradients)
    except Exception as error:
        raise _failure("backward", stage_output, output_grads, input_values) from error
    return tuple(_take_gradient(value) for value in input_values)


def stage_backward_input(
    stage_outputs_or_loss: Sequence[torch.Tensor],
    output_grads: Sequence[torch.Tensor | None] | None,
    input_values: Sequence[Any],
    weights: Iterator[Parameter],
) -> tuple[tuple[torch.Tensor | None, ...], list[dict[str, Any]]]:
    """Compute the gradients of a stage's inputs and leave the weights' for :func:`stage_backward_weight`.

    The graph serves this backward alone: what the weights' gradients do not need is released. Inputs are taken as
    independent of each other. Where no input needs a gradient, all is left for later.

    Args:
        stage_outputs_or_loss: The outputs, or the loss.
        output_grads: One for each output, ``None`` for an output that got none; ones everywhere when this is ``None``.
        input_values: What went into the stage; each input's gradient is added to its ``grad``, too.
        weights: The stage's parameters. Every leaf that the outputs depend on gets its gradient, named here or not.

    Returns:
        For each input value its gradient, ``None`` where there is none; and what ``stage_backward_weight`` takes.
    """
    outputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for index, output in enumerate(stage_outputs_or_loss):
        gradient = torch.ones_like(output) if output_grads is None else output_grads[index]
        _add_root(outputs, gradients, output, gradient)
    positions = [i for i, value in enumerate(input_values) if isinstance(value, torch.Tensor) and value.requires_grad]
    try:
        found, weight_half = _C.input_backward(outputs, gradients, [input_values[i] for i in positions])
    except Exception as error:
        raise _failure("backward for the inputs", stage_outputs_or_loss, output_grads, input_values) from error
    result: list[torch.Tensor | None] = [None] * len(input_values)
    for position, gradient in zip(positions, found, strict=True):
        result[position] = gradient
        if gradient is not None:
            _accumulate(input_values[position], gradient)
    return tuple(result), [{"weight_half": weight_half}]


def stage_backward_weight(
    weights: Iterable[Parameter], param_groups: list[dict[str, Any]], retain_graph: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """Compute the weight gradients that :func:`stage_backward_input` left, once, and accumulate them into the weights.

    Args:
        weights: The parameters whose gradients to return.
        param_groups: What ``stage_backward_input`` gave.
        retain_graph: Keep the saved tensors of the weight side, for a graph that other microbatches share.

    Returns:
        The ``grad`` of each weight.
    """
    for group in param_groups:
        if "weight_half" not in group:
            raise PipelineUsageError(
                "stage_backward_weight takes what pp_runtime's stage_backward_input returned; a group without "
                f"'weight_half' came from elsewhere (its keys are {sorted(group)})."
            )
        group["weight_half"].run(retain_graph)
    return tuple(weight.grad for weight in weights)


def _pairs(output: Any, gradient: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The tensors of a nest, each with its gradient. A part that is no tensor and has no gradient is left out."""
    if isinstance(output, torch.Tensor):
        if gradient is not None and not isinstance(gradient, torch.Tensor):
            raise PipelineUsageError(f"An output's gradient is a tensor or None, not {type(gradient).__name__}.")
        yield output, gradient
    elif isinstance(output, (tuple, list)) and gradient is not None:
        if not isinstance(gradient, (tuple, list)) or len(gradient) != len(output):
            raise PipelineUsageError(
                f"{len(output)} outputs need as many gradients, not {_size(gradient)} ({type(gradient).__name__})."
            )
        for part, part_gradient in zip(output, gradient, strict=True):
            yield from _pairs(part, part_gradient)
    elif isinstance(output, dict) and gradient is not None:
        if not isinstance(gradient, dict) or gradient.keys() != output.keys():
            raise PipelineUsageError(f"The gradients of outputs {list(output)} are to be a dict with the same keys.")
        for key, part in output.items():
            yield from _pairs(part, gradient[key])


def _size(value: Any) -> int | str:
    return len(value) if hasattr(value, "__len__") else "one"


def _add_root(
    outputs: list[torch.Tensor], gradients: list[torch.Tensor], output: torch.Tensor, gradient: torch.Tensor | None
) -> None:
    if not output.requires_grad:
        return
    if gradient is None:
        if output.numel() != 1:
            return
        gradient = torch.ones_like(output)
    outputs.append(output)
    gradients.append(gradient)


def _take_gradient(value: Any) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor) or not value.is_leaf and not value.retains_grad:
        return None
    gradient, value.grad = value.grad, None
    return gradient


def _accumulate(value: torch.Tensor, gradient: torch.Tensor) -> None:
    # Of a tensor that is no leaf, its own hook stores the gradient if the user asked for it.
    if value.is_leaf:
        value.grad = gradient if value.grad is None else value.grad + gradient


def _failure(what: str, outputs: Any, gradients: Any, inputs: Any) -> RuntimeError:
    return RuntimeError(
        f"A stage's {what} failed.\nOutputs: {_described(outputs)}\nGradients: {_described(gradients)}\n"
        f"Inputs: {_described(inputs)}"
    )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"Tensor({tuple(value.shape)}, {value.dtype}, grad={value.requires_grad})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_described(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_described, value)) + ")"
    return repr(value)
