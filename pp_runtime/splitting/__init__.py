"""A whole model to stages: the tracer, and what it cuts by."""

from __future__ import annotations

from pp_runtime.splitting.torch_package import torch_pipelining
from pp_runtime.splitting.tracing import Pipe, SplitPoint, pipe_split, pipeline

__all__ = [
    "Pipe",
    "SplitPoint",
    "pipe_split",
    "pipeline",
    "torch_pipelining",
]
