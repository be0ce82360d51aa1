"""Gradients over microbatches, stages and ranks: set aside, scaled, reduced, tied, clipped."""

from __future__ import annotations

from pp_runtime.running.gradients.actions import data_parallel_handlers
from pp_runtime.running.gradients.clipping import clip_grad_norm_
from pp_runtime.running.gradients.grad_scaler import PipelineGradScaler
from pp_runtime.running.gradients.step_gradients import StepGradients, scale_gradients
from pp_runtime.running.gradients.tied import (
    TiedGradients,
    claims_of,
    find_parameter,
    read_claims,
    ties_of,
    unwrapped_name,
)

__all__ = [
    "PipelineGradScaler",
    "StepGradients",
    "TiedGradients",
    "claims_of",
    "clip_grad_norm_",
    "data_parallel_handlers",
    "find_parameter",
    "read_claims",
    "scale_gradients",
    "ties_of",
    "unwrapped_name",
]
