"""Checkpoints under the unsplit model's parameter names: written by any number of ranks, read by any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step; one that was not finished has no metadata and does not count."""
    return max((path.parent for path in folder.glob("step-*/.metadata")), default=None)


def save(folder: Path, step: int, modules: list[nn.Module], optimizer: torch.optim.Optimizer) -> Path:
    """Write what all ranks hold; a collective call. Each rank writes its own parameters."""
    path = folder / f"step-{step:08d}"
    dcp.save(_state(step, modules, optimizer), checkpoint_id=path)
    return path


def load(path: Path, modules: list[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Fill this rank's parameters and moments, whoever wrote them, and return the step; a collective call."""
    state = _state(0, modules, optimizer)
    dcp.load(state, checkpoint_id=path)
    return int(state["step"])


def _state(step: int, modules: list[nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors themselves, by name; moments that do not exist yet are made, so that loading can fill them."""
    named = {name: parameter for module in modules for name, parameter in module.named_parameters()}
    for parameter in named.values():
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros(())
            moments.update({name: torch.zeros_like(parameter) for name in _MOMENTS})
    return {
        "step": step,
        "model": {name: parameter.detach() for name, parameter in named.items()},
        "optimizer": {name: optimizer.state[parameter] for name, parameter in named.items()},
    }
