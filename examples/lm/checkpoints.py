"""Checkpoints under the unsplit model's parameter names: written by any number of ranks, read by any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from pp_runtime import BuiltPipeline


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
    return {"step": step, "model": pipeline, "optimizer": pipeline.stateful(optimizer)}
