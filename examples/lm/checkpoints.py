"""Checkpoints under the unsplit model's parameter names: written by any number of ranks, read by any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from pp_runtime import BuiltPipeline

_MOMENTS = ("exp_avg", "exp_avg_sq")


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step; one that was not finished has no metadata and does not count."""
    return max((path.parent for path in folder.glob("step-*/.metadata")), default=None)


def save(folder: Path, step: int, pipeline: BuiltPipeline, optimizer: torch.optim.Optimizer) -> Path:
    """Write what all ranks hold; a collective call. Each rank writes its own parameters."""
    path = folder / f"step-{step:08d}"
    dcp.save(_state(step, pipeline, optimizer), checkpoint_id=path)
    return path


def load(path: Path, pipeline: BuiltPipeline, optimizer: torch.optim.Optimizer) -> int:
    """Fill this rank's parameters and moments, whoever wrote them, and return the step; a collective call."""
    state = _state(0, pipeline, optimizer)
    dcp.load(state, checkpoint_id=path)
    return int(state["step"])


def _state(step: int, pipeline: BuiltPipeline, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors themselves, by name; moments that do not exist yet are made, so that loading can fill them."""
    named = dict(pipeline.named_parameters())
    for parameter in named.values():
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros(())
            moments.update({name: torch.zeros_like(parameter) for name in _MOMENTS})
    return {
        "step": step,
        "model": pipeline,
        "optimizer": {name: optimizer.state[parameter] for name, parameter in named.items()},
    }
