"""Modules of their own over a model's tensors, or over others in their place, such as ones without values.

A model on the meta device is run on stand-ins: all on the meta device, or, where an operation has no form for that, on
zeros, which costs a forward's time.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pp_runtime.errors import PipelineUsageError

Replace = Callable[[Tensor], Tensor]
Run = Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], Any]
"""Of a model and its inputs."""


def tensors_of(nest: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]


def skeleton(module: nn.Module, replace: Replace | None = None) -> nn.Module:
    """The module and those in it anew, over the same parameters, buffers and tensors, or over what replaces each."""
    return _skeleton(module, replace, {})


def _skeleton(module: nn.Module, replace: Replace | None, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    copied = made[id(module)] = module.__class__.__new__(module.__class__)
    copied.__dict__.update(
        {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
    )
    if replace is not None:
        tensors: list[dict[str, Any]] = [copied._parameters, copied._buffers, copied.__dict__]
        for held in tensors:
            held.update({name: replace(value) for name, value in held.items() if isinstance(value, Tensor)})
    copied._modules = {
        name: None if child is None else _skeleton(child, replace, made) for name, child in module._modules.items()
    }
    return copied


def lacks_values(model: nn.Module) -> bool:
    """Whether a parameter is on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


def run_on_stand_ins(run: Run, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What ``run`` returns of a model, some of whose parameters have no values, and of its inputs."""
    try:
        with AnswersForValues():
            return _run_on(on_meta, run, model, args, kwargs)
    except PipelineUsageError:
        raise
    except Exception:  # an operation without a form for the meta device
        return _run_on(_as_zeros, run, model, args, kwargs)


def _run_on(replace: Replace, run: Run, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    moved_args, moved_kwargs = tree_map_only(Tensor, replace, (tuple(args), dict(kwargs)))
    return run(skeleton(model, replace), moved_args, moved_kwargs)


class AnswersForValues(TorchDispatchMode):
    """Answers 0 or False where a forward asks for the value of a tensor that has none: whether a mask masks nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return function(*args, **(kwargs or {}))


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _as_zeros(tensor: Tensor) -> Tensor:
    """On the CPU: its values, or zeros if it has none, whose pages take no memory as long as they are only read."""
    return _zeros_or_own(tensor).requires_grad_(tensor.requires_grad)


def _zeros_or_own(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor.detach().cpu()
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    pages = mmap.mmap(-1, tensor.numel() * tensor.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
