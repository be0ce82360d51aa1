"""The part of a schedule that custom functions use: registration, and torch's helpers for handlers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from pp_runtime.errors import PipelineModeError, PipelineTypeError
from pp_runtime.orders import Action, ActionType, ir, leaves
from pp_runtime.schedules.custom_context import CurrentStep, _CustomFunctionProtocol, check_custom_type
from pp_runtime.schedules.fields import ScheduleFields
from pp_runtime.schedules.step_losses import StepLosses


class CustomFunctions(ScheduleFields):
    """Holds the custom functions of a schedule, and the losses that they compute."""

    def __init__(self) -> None:
        super().__init__()
        self._comp_type_to_function_map: dict[ActionType, _CustomFunctionProtocol] = {}
        self._current_step = CurrentStep()
        self._step_losses = StepLosses()

    def register_custom_function(self, computation_type: ActionType, custom_function: _CustomFunctionProtocol) -> None:
        """Have ``custom_function(action, context)`` do every action of this type, in place of the runtime.

        All ranks must register the same types before the same step.
        """
        if not callable(custom_function):
            raise PipelineTypeError(f"custom_function must be callable, got {type(custom_function).__name__}")
        self._comp_type_to_function_map[check_custom_type(computation_type)] = custom_function
        self._runtime = None  # the next step is planned anew

    def _begin_custom_step(self) -> None:
        self._step_losses.clear()
        self._current_step.backward_counter.clear()
        for stage in self._stages:
            stage._inside_step = True

    def _end_custom_step(self) -> None:
        self._step_losses.clear()
        self._current_step.context = None
        for stage in self._stages:
            stage._inside_step = False

    def _handlers(self) -> dict[ActionType, Callable[..., None]]:
        return {kind: self._current_step.handler(func) for kind, func in self._comp_type_to_function_map.items()}

    @property
    def backward_counter(self) -> Counter[int]:
        """For custom functions: how many B and W each stage of this rank has done in this step."""
        return self._current_step.backward_counter

    def _compute_loss(self, output: Any, target: Any, loss_kwargs: dict[str, Any] | None = None) -> Any:
        if self._loss_fn is None:
            raise PipelineModeError("there is no loss to compute: pass loss_fn when making the schedule")
        return self._loss_fn(output, target, **(loss_kwargs or {}))

    @property
    def _internal_losses(self) -> list[torch.Tensor]:
        """The losses that custom functions computed in this step, as they came. They may append their own."""
        return self._step_losses.values

    @_internal_losses.setter
    def _internal_losses(self, losses: list[torch.Tensor]) -> None:
        self._step_losses = StepLosses()
        self._step_losses.values.extend(losses)

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: list | None, mb_index: int, loss_kwargs: Any = None
    ) -> None:
        """For custom functions that run a forward: compute and keep the loss if the stage is the last one."""
        if stage.is_last and self._loss_fn is not None:
            target = None if target_mbs is None else target_mbs[mb_index]
            loss = self._compute_loss(output, target, loss_kwargs)
            self._step_losses.add(mb_index, loss)
            self._begin_backward_at(stage, mb_index, loss)

    def _begin_backward_at(self, stage: Any, mb_index: int, loss: torch.Tensor) -> None:
        if self._has_backward and loss.requires_grad:
            stage._core.set_loss(mb_index, loss)  # where a backward without a handler begins

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Any:
        """For custom functions that run a backward: this microbatch's loss, or None if the stage is not the last.

        None also if the runtime ran the forward: it then holds the loss, and ``backward_one_chunk`` starts from it.
        """
        loss = self._step_losses.of(mb_index) if stage.is_last else None
        if loss is None and stage.is_last and self._internal_losses and ir.FORWARD in self._comp_type_to_function_map:
            raise PipelineModeError(
                f"the loss of microbatch {mb_index} is not available: {len(self._internal_losses)} losses have been "
                "computed in this step, by custom forwards of other microbatches"
            )
        return loss

    def _take_appended_losses(self, action: Action) -> None:
        """After a custom function: losses that it appended to ``_internal_losses`` are those of its forwards."""
        last = next((stage for stage in self._stages if stage.is_last), None)
        if last is not None:
            forwards = [part for part in leaves((action,)) if part.computation_type is ir.FORWARD]
            mine = [part.microbatch_index or 0 for part in forwards if part.stage_index == last.stage_index]
            for microbatch, loss in self._step_losses.claim(mine):
                self._begin_backward_at(last, microbatch, loss)

    def _update_losses(self, stages: Any, losses: list | None) -> None:
        """For programs with a step of their own: give and forget the losses, if the last stage is among the stages."""
        holds_last = any(stage.is_last for stage in (stages if isinstance(stages, list) else [stages]))
        if holds_last and losses is not None:
            if len(self._internal_losses) != self._n_microbatches:
                raise PipelineModeError(
                    f"{self._n_microbatches} losses were expected, one for each microbatch, but "
                    f"{len(self._internal_losses)} have been computed"
                )
            losses[:] = self._step_losses.in_order()
        self._step_losses.clear()

    def _all_outputs(self, outputs: list[Any] | None, custom: list[Any]) -> list[Any]:
        """The last stage's outputs in microbatch order; ``custom`` are those of custom forwards, as they ran."""
        if not custom:
            return list(outputs or ())
        rest = iter(custom)
        return [next(rest) if output is None else output for output in outputs or [None] * len(custom)]

    def _all_losses(self, runtime_losses: list[torch.Tensor]) -> list[torch.Tensor]:
        """The losses of the runtime's own forwards and of custom ones, in microbatch order."""
        if not self._internal_losses or len(runtime_losses) == self._n_microbatches:
            return runtime_losses
        rest = iter(runtime_losses)
        merged: list[torch.Tensor] = []
        for microbatch in range(self._n_microbatches):
            custom = self._step_losses.of(microbatch)
            loss = next(rest, None) if custom is None else custom.detach()
            if loss is None:
                raise PipelineModeError(
                    f"microbatch {microbatch} has no loss: a custom forward of the last stage must call "
                    "ctx.schedule_ref._maybe_compute_loss(stage, output, ctx.target_mbs, action.microbatch_index)"
                )
            merged.append(loss)
        return merged
