"""The parts of a stage: one microbatch in torch's form, torch's other names, copies, checkpointing."""

from __future__ import annotations

from pp_runtime.running.stages.backward_functions import stage_backward, stage_backward_input, stage_backward_weight
from pp_runtime.running.stages.chunk_methods import ChunkMethods, base_of_stages
from pp_runtime.running.stages.copies import CopiedStage
from pp_runtime.running.stages.gradient_graph import (
    _get_grad_fn_or_grad_acc,
    construct_reverse_graph,
    get_param_groups,
    reverse_closure,
)
from pp_runtime.running.stages.torch_names import TorchStageNames

__all__ = [
    "ChunkMethods",
    "CopiedStage",
    "TorchStageNames",
    "_get_grad_fn_or_grad_acc",
    "base_of_stages",
    "construct_reverse_graph",
    "get_param_groups",
    "reverse_closure",
    "stage_backward",
    "stage_backward_input",
    "stage_backward_weight",
]
