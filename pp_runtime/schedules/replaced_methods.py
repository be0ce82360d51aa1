"""Actions of stages whose methods a program replaced: each is the stage's method, called as torch calls it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import Action, ActionType, ir
from pp_runtime.planning import MethodHandler
from pp_runtime.schedules.custom_context import CurrentStep, _PipelineContext
from pp_runtime.stage import _PipelineStageBase


def method_handlers(
    step: CurrentStep, stage: _PipelineStageBase, replaced: frozenset[str], *, computes_loss: bool
) -> dict[ActionType, MethodHandler]:
    """What is called for the actions of a stage with these methods replaced; nothing for one that has none.

    ``computes_loss``: the schedule's own computation of the loss was replaced, and this is the stage that has one.
    """
    handlers: dict[ActionType, MethodHandler] = {}
    if computes_loss or replaced.difference(("scale_grads", "perform_reduce_grad")):
        handlers[ir.FORWARD] = partial(_forward, step, stage)
        handlers[ir.FULL_BACKWARD] = partial(_backward, step, stage, full=True)
        handlers[ir.BACKWARD_INPUT] = partial(_backward, step, stage, full=False)
        handlers[ir.BACKWARD_WEIGHT] = partial(_weight_backward, stage)
    if "perform_reduce_grad" in replaced:
        handlers[ir.REDUCE_GRAD] = partial(_reduce, step, stage)
    return handlers


def modules_of(function: Any) -> tuple[torch.nn.Module, ...]:
    """The modules that a loss function is made of: itself, what it is a method of, what a partial binds."""
    if isinstance(function, torch.nn.Module):
        return (function,)
    if isinstance(function, partial):
        parts = (function.func, *function.args, *function.keywords.values())
        return tuple(module for part in parts for module in modules_of(part))
    owner = getattr(function, "__self__", None)
    return (owner,) if isinstance(owner, torch.nn.Module) else ()


def _forward(step: CurrentStep, stage: _PipelineStageBase, action: Action, last: bool) -> None:
    context, schedule = _running(step, action)
    microbatch = _microbatch(action)
    args, kwargs = (context.arg_mbs or [])[microbatch], (context.kwarg_mbs or [])[microbatch]
    output = stage.forward_one_chunk(microbatch, args, kwargs, save_forward_output=step.return_outputs)
    schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch, step.loss_kwargs)


def _backward(step: CurrentStep, stage: _PipelineStageBase, action: Action, last: bool, *, full: bool) -> None:
    _, schedule = _running(step, action)
    microbatch = _microbatch(action)
    loss = schedule._maybe_get_loss(stage, microbatch)
    stage.backward_one_chunk(microbatch, loss=loss, full_backward=full, last_backward=last and full)


def _weight_backward(stage: _PipelineStageBase, action: Action, last: bool) -> None:
    stage.backward_weight_one_chunk(_microbatch(action), last_backward=last)


def _reduce(step: CurrentStep, stage: _PipelineStageBase, action: Action, last: bool) -> None:
    _, schedule = _running(step, action)
    stage.perform_reduce_grad(schedule._n_microbatches if schedule.scale_grads else 1)


def _running(step: CurrentStep, action: Action) -> tuple[_PipelineContext, Any]:
    if step.context is None:
        raise PipelineUsageError(f"the stage's method for {action} was called outside of a step")
    return step.context, step.context.schedule_ref


def _microbatch(action: Action) -> int:
    assert action.microbatch_index is not None
    return action.microbatch_index
