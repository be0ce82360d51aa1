"""The base of all schedules: a batch goes in, is cut into microbatches, is run by the order, comes out whole."""

from __future__ import annotations

import contextlib
from abc import ABC
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from pp_runtime.errors import PipelineModeError, PipelineTypeError, PipelineUsageError
from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.orders import ActionType, ir
from pp_runtime.planning import MemoryReport, MethodHandler
from pp_runtime.running import (
    Runtime,
    Signature,
    StepGradients,
    StepMetrics,
    TellsRefusals,
    Work,
    checked_deadline,
    default_deadline,
    refuse_for,
    ties_of,
)
from pp_runtime.schedules.batches import BatchHandling
from pp_runtime.schedules.checks import (
    check_chunk_spec,
    check_loss_function,
    check_microbatch_count,
    check_stages_can_run,
)
from pp_runtime.schedules.custom_context import CurrentStep, _PipelineContext, backwards_before_each_action
from pp_runtime.schedules.custom_functions import CustomFunctions
from pp_runtime.schedules.initialization import StageInitialization
from pp_runtime.schedules.order_holder import OrderHolder, has_backwards
from pp_runtime.schedules.replaced_methods import method_handlers, modules_of
from pp_runtime.stage import _PipelineStageBase
from pp_runtime.timing import Timeline


class _PipelineSchedule(OrderHolder, CustomFunctions, BatchHandling, StageInitialization, TellsRefusals, ABC):
    """Runs whole batches through the pipeline, by an order that its subclass names.

    Making a schedule talks to no other rank; the first step does.
    """

    def __init__(
        self,
        n_microbatches: int,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        args_chunk_spec: tuple[TensorChunkSpec, ...] | None = None,
        kwargs_chunk_spec: dict[str, TensorChunkSpec] | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        scale_grads: bool = True,
        *,
        target_chunk_spec: Any = None,
    ) -> None:
        super().__init__()
        self._n_microbatches = check_microbatch_count(n_microbatches)
        self._loss_fn = check_loss_function(loss_fn)
        self._args_chunk_spec = check_chunk_spec(
            args_chunk_spec, "args_chunk_spec", (tuple, list), "(TensorChunkSpec(0), TensorChunkSpec(1))"
        )
        self._kwargs_chunk_spec = check_chunk_spec(
            kwargs_chunk_spec, "kwargs_chunk_spec", (dict,), "{'mask': TensorChunkSpec(0)}"
        )
        self._target_chunk_spec = target_chunk_spec
        self._output_merge_spec = output_merge_spec
        # True divides the summed gradients by the number of microbatches, which suits a loss that averages over rows.
        self.scale_grads = scale_grads
        self._has_backward = self._trains and self._loss_fn is not None

        self._order_has_backward = True
        self._record_timeline = False
        self._step_failed = False
        self._deadline = default_deadline()

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        arg_mbs: list[tuple] | None = None,
        kwarg_mbs: list[dict] | None = None,
        target_mbs: list | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one batch forward and, with a loss function, backward.

        ``args`` are the model's positional inputs, on the rank of the first stage; ``kwargs`` its keyword inputs, on
        every rank whose stage takes them; ``target`` goes to the loss function, on the rank of the last stage.
        ``arg_mbs``, ``kwarg_mbs`` and ``target_mbs`` are the same, already cut into microbatches.
        ``losses`` is emptied and filled with one detached loss a microbatch, on the rank of the last stage.
        Returns the whole batch's output there, unless ``return_outputs`` is False; None on other ranks.
        """
        try:
            check_stages_can_run(self._stages)
            self._check_mode(target, loss_kwargs)
            if arg_mbs is None and kwarg_mbs is None and target_mbs is None:
                arg_mbs, kwarg_mbs = self._split_inputs(args, kwargs)
                target_mbs = self._split_target(target)
            elif args or kwargs or target is not None:
                raise PipelineUsageError(
                    "arg_mbs, kwarg_mbs and target_mbs replace the whole-batch inputs: "
                    "pass either microbatches or args, kwargs and target, not both"
                )
            self._check_loss_inputs(target_mbs, losses)
            self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        except Exception as error:
            self._refuse_step(error)
            raise
        self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs)
        last_stage = self._last_stage()
        if last_stage is None or not return_outputs:
            return None
        return self._merge_outputs(last_stage.output_chunks)

    def eval(
        self,
        *args: Any,
        target: Any = None,
        losses: list | None = None,
        arg_mbs: list[tuple] | None = None,
        kwarg_mbs: list[dict] | None = None,
        target_mbs: list | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one batch forward only. Arguments and result are those of ``step``; the target may be left out."""
        has_backward = self._has_backward
        self._has_backward = False
        try:
            return self.step(
                *args,
                target=target,
                losses=losses,
                arg_mbs=arg_mbs,
                kwarg_mbs=kwarg_mbs,
                target_mbs=target_mbs,
                **kwargs,
            )
        finally:
            self._has_backward = has_backward

    def compile_stages(self, **options: Any) -> None:
        """Compile every stage of this rank in place, each as ``PipelineStage.compile`` does with these options."""
        for stage in self._stages:
            stage.compile(**options)

    def _step_microbatches(
        self,
        arg_mbs: list | None = None,
        kwarg_mbs: list | None = None,
        target_mbs: list | None = None,
        losses: list | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Run microbatches that are already cut; the last stage's outputs are left in its ``output_chunks``."""
        try:
            arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
            for stage in self._stages:
                self._prepare(stage)
            first_target = None if target_mbs is None else target_mbs[0]
            self._initialize_stages(arg_mbs[0], kwarg_mbs[0], first_target, loss_kwargs)
            runtime = self._ensure_runtime()
            training = self._has_backward and self._order_has_backward
            gradients = self._gradients_of_step() if training else None
        except Exception as error:
            self._refuse_step(error)
            raise
        self._begin_custom_step()
        self._current_step.context = _PipelineContext(self, arg_mbs, kwarg_mbs, target_mbs, losses)
        self._current_step.return_outputs, self._current_step.loss_kwargs = return_outputs, loss_kwargs
        try:
            if gradients is not None:
                gradients.begin()
            result = runtime.step(
                arg_mbs,
                kwarg_mbs,
                target_mbs,
                training=training,
                loss_fn=self._loss_to_run(),
                return_outputs=return_outputs,
                loss_kwargs=loss_kwargs,
            )
            if gradients is not None:
                self._finish_gradients(gradients)
            step_losses = self._all_losses(result.losses)
        finally:
            if gradients is not None:
                gradients.close()
            self._end_custom_step()
            if runtime.over():
                self._runtime = None  # a failed step ends its runtime on every rank
                self._step_failed = True
        self._step_failed = False
        self._forget_order()
        if not training:
            self._free_gathered_weights()
        last_stage = self._last_stage()
        if last_stage is None:
            return
        chunks = last_stage.output_chunks
        chunks[:] = self._all_outputs(result.outputs, chunks[:]) if return_outputs else []
        if losses is not None:
            losses[:] = step_losses

    def _prepare(self, stage: _PipelineStageBase) -> None:
        stage.has_backward = self._has_backward
        stage.chunks = self._n_microbatches
        stage.output_chunks.clear()
        stage._clear_caches()
        stage._loss_modules = modules_of(self._loss_fn) if stage.is_last and self._has_backward else ()
        stage.refresh()

    def _gradients_of_step(self) -> StepGradients | None:
        """What tells the gradients of this step from those of steps before; None where nobody needs to."""
        divides = self.scale_grads and self._n_microbatches > 1
        if divides or ir.REDUCE_GRAD in self._comp_type_to_function_map or any(map(ties_of, self._stages)):
            return StepGradients(self._stages)
        return None

    def _finish_gradients(self, gradients: StepGradients) -> None:
        if ir.REDUCE_GRAD in self._comp_type_to_function_map:
            gradients.end(None)
            return
        divisor = self._n_microbatches if self.scale_grads else 1
        for stage in self._stages:
            if stage.replaces("scale_grads"):
                stage.scale_grads(divisor)
        gradients.end(divisor)

    def _loss_to_run(self) -> Callable[..., torch.Tensor] | None:
        """The loss function, or this schedule's own way to compute the loss where a program replaced that."""
        if self._loss_fn is None or not self._replaces("_compute_loss"):
            return self._loss_fn
        step = self._current_step

        def compute_loss(output: Any, target: Any, **loss_kwargs: Any) -> Any:
            assert step.context is not None
            compute = step.context.schedule_ref._compute_loss
            return compute(output, target, loss_kwargs) if loss_kwargs else compute(output, target)

        return compute_loss

    def _replaces(self, *names: str) -> bool:
        return any(
            name in self.__dict__ or getattr(type(self), name) is not getattr(CustomFunctions, name) for name in names
        )

    def _free_gathered_weights(self) -> None:
        # A backward would do this; without one, the weights gathered for a forward would outlive their next change.
        for stage in self._stages:
            adapter = stage.adapter()
            if adapter is not None:
                adapter.reshard()

    def _ensure_runtime(self) -> Runtime:
        if self._runtime is None:
            check_stages_can_run(self._stages)
            order, with_comms = self._order_to_run()
            own_actions = order.get(self._stages[0].group_rank, [])
            self._order_has_backward = has_backwards([own_actions])
            if self._comp_type_to_function_map:
                self._current_step.backwards_before = backwards_before_each_action(own_actions)
            self._runtime = Runtime(
                self._stages,
                order,
                self._placement,
                self._n_microbatches,
                has_backward=self._loss_fn is not None and self._order_has_backward,
                with_comms=with_comms,
                custom_functions=self._handlers(),
                rebuild_order=self._rebuild,
                method_handlers=partial(_methods_of, self._current_step),
                name=type(self).__name__,
            )
            self._runtime.record_timeline = self._record_timeline
            self._runtime.deadline = self._deadline
        return self._runtime

    def _order_changed(self) -> None:
        self._runtime = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes a runtime of its own.
        return self.__dict__ | {"_runtime": None, "_step_failed": False}

    def _refuse_step(self, error: Exception) -> None:
        """Tell the ranks that this one will not take part in the step, so that they raise and do not wait."""
        runtime, self._runtime = self._runtime, None
        self._step_failed = True
        if runtime is not None and runtime.began():
            # The error itself is what its user must see, also if the others cannot be told.
            with contextlib.suppress(Exception):
                runtime.refuse(error)
        else:
            refuse_for(self._stages[0], error)

    def _check_mode(self, target: Any, loss_kwargs: Any) -> None:
        if self._has_backward and self._backward_requires_autograd and not torch.is_grad_enabled():
            raise PipelineModeError(
                "step() runs a backward and so cannot be used under torch.no_grad(): "
                "call it outside, or call eval() for a forward only"
            )
        if target is not None and self._loss_fn is None:
            raise PipelineModeError("a target was given but there is no loss_fn: pass loss_fn when making the schedule")
        if loss_kwargs is not None and not isinstance(loss_kwargs, dict):
            raise PipelineTypeError(f"loss_kwargs must be a dict or None, got {type(loss_kwargs).__name__}")

    def _check_loss_inputs(self, target_mbs: list | None, losses: list | None) -> None:
        if self._last_stage() is None:
            return
        if self._loss_fn is None and (losses is not None or target_mbs is not None):
            raise PipelineModeError(
                "a loss was asked for but there is no loss_fn: pass loss_fn when making the schedule"
            )
        wants_loss = self._has_backward or losses is not None
        if wants_loss and target_mbs is None and ir.FORWARD not in self._comp_type_to_function_map:
            raise PipelineUsageError(
                "the last stage is on this rank, so the loss needs a target: call step(..., target=...) here"
            )

    @property
    def deadline(self) -> float:
        """Seconds that this rank waits in ``step()`` for another before it raises, and says who waits for whom.

        Unless it is set, what the environment variable PP_RUNTIME_DEADLINE says, or half an hour.
        """
        return self._deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self._deadline = checked_deadline(seconds, "deadline")
        if self._runtime is not None:
            self._runtime.deadline = self._deadline

    @property
    def record_timeline(self) -> bool:
        """Whether steps record when each action began and ended, for ``timeline()``."""
        return self._record_timeline

    @record_timeline.setter
    def record_timeline(self, enabled: bool) -> None:
        self._record_timeline = bool(enabled)
        if self._runtime is not None:
            self._runtime.record_timeline = self._record_timeline

    def timeline(self) -> Timeline:
        """What this rank did in the last step, and when. Set ``record_timeline = True`` before that step."""
        if not self._record_timeline:
            raise PipelineModeError("no timeline was recorded: set schedule.record_timeline = True before the step")
        if self._runtime is None:
            raise PipelineModeError("there is no timeline before the first step")
        return self._runtime.timeline()

    def metrics(
        self, *, tokens: float | None = None, flops: float | None = None, peak_flops: float | None = None
    ) -> StepMetrics:
        """What the last ``step()`` or ``eval()`` took on this rank: time, compute, waiting, bubble, bytes. Always on.

        Told the ``tokens`` of the batch it knows tokens a second; told the ``flops`` of the whole model in the step
        (forward and backward, such as ``6 * parameters * tokens``) and the ``peak_flops`` a second of one rank's
        device, their utilisation. Asks no other rank: ``gather()`` of what it returns does. On an accelerator it waits
        until the step has ended there, so ask only where it is logged. PipelineModeError before the first step, and
        where the last one failed.
        """
        work = Work(tokens, flops, peak_flops)
        found = None if self._runtime is None else self._runtime.metrics(work)
        if found is None:
            raise PipelineModeError(
                "the last step failed, so there are no metrics of it: call metrics() after a step that ended"
                if self._step_failed
                else "there are no metrics before the first step: call step() or eval(), then metrics()"
            )
        return found

    def memory_report(self, signature: Signature | None = None) -> MemoryReport:
        """What the messages of a step take on each rank: slots, bytes, inputs kept, and what torch would hold.

        Before the first step, and without any other rank, ``signature`` says what one microbatch sends from a stage to
        the next: a tensor, a sequence of them, or a mapping from ``(source, destination)`` to either; tensors on the
        meta device do. The report is then of all ranks. Without it, it is of this rank, as its first step had it.
        """
        return self._ensure_runtime().memory_report(signature, torch_keeps_sent=self._order_name != "1F1B")


def _methods_of(
    step: CurrentStep, stage: _PipelineStageBase, replaced: frozenset[str]
) -> Mapping[ActionType, MethodHandler]:
    # Holds the step and not the schedule: a schedule that its user drops is freed at once.
    schedule = None if step.context is None else step.context.schedule_ref
    computes_loss = (
        stage.is_last and schedule is not None and schedule._replaces("_maybe_compute_loss", "_maybe_get_loss")
    )
    return method_handlers(step, stage, replaced, computes_loss=computes_loss)
