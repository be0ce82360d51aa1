"""A whole model to stages: the tracer, and what it cuts by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pp_runtime.splitting import tracing
from pp_runtime.splitting.layer_costs import layer_costs, moment
from pp_runtime.splitting.layered import layer_modules, layer_stages
from pp_runtime.splitting.loading import load_weights
from pp_runtime.splitting.model_costs import model_costs
from pp_runtime.splitting.partition import Partition, partition
from pp_runtime.splitting.placement import stages_of_rank
from pp_runtime.splitting.rehearsal import find_layers
from pp_runtime.splitting.skeleton import AnswersForValues, lacks_values, on_meta, tensors_of
from pp_runtime.splitting.torch_package import torch_pipelining
from pp_runtime.splitting.tracing import annotate_split_points, pipeline
from pp_runtime.splitting.unchanged import unchanged
from pp_runtime.splitting.weightless import without_weights
from pp_runtime.splitting.weights import Weights, open_weights

if TYPE_CHECKING:
    from pp_runtime.splitting.tracing import Pipe, SplitPoint, pipe_split

__all__ = [
    "AnswersForValues",
    "Partition",
    "Pipe",
    "SplitPoint",
    "Weights",
    "annotate_split_points",
    "find_layers",
    "lacks_values",
    "layer_costs",
    "layer_modules",
    "layer_stages",
    "load_weights",
    "model_costs",
    "moment",
    "on_meta",
    "open_weights",
    "partition",
    "pipe_split",
    "pipeline",
    "stages_of_rank",
    "tensors_of",
    "torch_pipelining",
    "unchanged",
    "without_weights",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # made when first used, of torch's own
        return getattr(tracing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
