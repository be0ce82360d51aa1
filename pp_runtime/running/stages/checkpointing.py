"""What the split backward asks about activation checkpoints, and the recomputation of a reentrant one."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction, set_device_states


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a graph node is torch's own reentrant checkpoint; others of that name keep their own state."""
    return getattr(type(node), "_forward_cls", None) is CheckpointFunction


_saved_tensor_names: dict[type, tuple[str, ...]] = {}


def _names_of_saved_tensors(node_type: type) -> tuple[str, ...]:
    if node_type not in _saved_tensor_names:
        _saved_tensor_names[node_type] = tuple(name for name in dir(node_type) if name.startswith("_raw_saved_"))
    return _saved_tensor_names[node_type]


def saves_behind_hooks(node: Any) -> bool:
    """Whether a saved tensor of the node was packed by a hook, as a checkpoint's are. A Python Function may always."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return True
    for name in _names_of_saved_tensors(type(node)):
        saved = getattr(node, name)
        for tensor in saved if isinstance(saved, (tuple, list)) else (saved,):
            if getattr(tensor, "unpack_hook", None) is not None:
                return True
    return False


def recompute(context: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a reentrant checkpoint's function again under the conditions of its forward, this time with gradients on.

    Returns its outputs and the detached tensors that went in. CheckpointFunction's own backward goes on to run that
    graph's whole backward; the caller splits it instead. A place without a tensor holds one that needs no gradient.
    """
    arguments = list(context.inputs)
    detached = []
    for index, tensor in zip(context.tensor_indices, context.saved_tensors, strict=True):
        arguments[index] = tensor.detach().requires_grad_(tensor.requires_grad)
        detached.append(arguments[index])
    with contextlib.ExitStack() as conditions:
        if context.preserve_rng_state:
            devices = context.fwd_devices if context.had_device_in_fwd else []
            conditions.enter_context(torch.random.fork_rng(devices=devices, device_type=context.device_type))
            torch.set_rng_state(context.fwd_cpu_state)
            if context.had_device_in_fwd:
                set_device_states(context.fwd_devices, context.fwd_device_states, device_type=context.device_type)
        if context.device_autocast_kwargs is not None:
            conditions.enter_context(torch.amp.autocast(context.device_type, **context.device_autocast_kwargs))
        conditions.enter_context(torch.amp.autocast("cpu", **context.cpu_autocast_kwargs))
        conditions.enter_context(torch.enable_grad())
        outputs = context.run_function(*arguments)
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    nothing = torch.empty(0)
    return [output if isinstance(output, torch.Tensor) else nothing for output in outputs], detached
