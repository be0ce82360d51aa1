"""torch's place for the backward of a stage, whole or split in two."""

from __future__ import annotations

from pp_runtime.running import (
    _get_grad_fn_or_grad_acc,
    construct_reverse_graph,
    get_param_groups,
    reverse_closure,
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)

__all__ = [
    "_get_grad_fn_or_grad_acc",
    "construct_reverse_graph",
    "get_param_groups",
    "reverse_closure",
    "stage_backward",
    "stage_backward_input",
    "stage_backward_weight",
]
