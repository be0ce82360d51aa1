"""Runs a schedule on this rank: plans once, agrees with the other ranks, then leaves each step to the executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pp_runtime import _C
from pp_runtime.errors import PipelineModeError
from pp_runtime.orders import ActionType, Order, Placement
from pp_runtime.planning import Handlers, Lowered, MemoryReport, MethodHandler, Plan, Wiring, plan_memory
from pp_runtime.running.agreement import (
    Agreement,
    Claim,
    FailureRecord,
    check_claims,
    check_orders,
    check_ranks_exist,
    checked_deadline,
    default_deadline,
    fingerprint,
    group_or_world,
)
from pp_runtime.running.channels import OpenChannels, open_channels
from pp_runtime.running.gradients import TiedGradients, claims_of, data_parallel_handlers, read_claims
from pp_runtime.running.held_stage import HeldStage
from pp_runtime.running.meter import Meter, Signature, loads_of
from pp_runtime.running.metrics import StepMetrics, Work, metrics_of
from pp_runtime.running.oversight import Lookout, end_of_step
from pp_runtime.timing import Timeline


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives this rank: the last stage's, empty on ranks that do not hold it. In microbatch order."""

    outputs: list[Any] | None
    losses: list[torch.Tensor]


class Runtime:
    """One rank's side of a pipeline.

    Making it talks to nobody. The first step exchanges claims with the other ranks, opens the channels and builds the
    executor. If that or a step fails on any rank, every rank raises and this runtime is over: the schedule makes a new
    one for its next step.
    """

    def __init__(
        self,
        stages: Sequence[HeldStage],
        order: Order,
        placement: Placement,
        num_microbatches: int,
        *,
        has_backward: bool = True,
        with_comms: bool = False,
        custom_functions: Mapping[ActionType, Callable[..., None]] | None = None,
        rebuild_order: Callable[[], Order] | None = None,
        method_handlers: Callable[[HeldStage, frozenset[str]], Mapping[ActionType, MethodHandler]] | None = None,
        name: str = "this schedule",
    ) -> None:
        self._name = name
        self._stages = sorted(stages, key=lambda stage: stage.stage_index)
        self._has_backward = has_backward
        self._rank = stages[0].group_rank
        self._group = stages[0].group
        self._plan = Plan(
            order,
            placement,
            num_microbatches,
            Wiring.of(stages[0].num_stages, stages[0].wiring),
            has_backward=has_backward,
            with_comms=with_comms,
            rebuild_order=rebuild_order,
        )
        self._custom_functions = dict(custom_functions or {})
        self._method_handlers = method_handlers or (lambda stage, replaced: {})
        self._replaced: list[frozenset[str]] = []
        self._tied: TiedGradients | None = None
        self._agreement: Agreement | None = None
        self._channels: OpenChannels | None = None
        self._executors: dict[bool, _C.Executor] = {}
        self._step = 0
        self._over = False
        self._recording = False
        self._deadline = default_deadline()
        self._last: _C.Executor | None = None
        self._timeline: Timeline | None = None
        self._meter: Meter | None = None

    # Steps

    def step(
        self,
        arg_mbs: list[tuple],
        kwarg_mbs: list[dict],
        target_mbs: list | None,
        *,
        training: bool,
        loss_fn: Callable[..., Any] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict | None = None,
    ) -> StepResult:
        """Run every microbatch through this rank's part of the order. Raises what failed first, on whichever rank."""
        executor = None
        self._last = self._timeline = None
        measuring = self._meter is None and training is self._has_backward
        try:
            if measuring:
                self._set_meter(Meter())
            self._begin()
            executor = self._executors[training]
            executor.run(self._step, arg_mbs, kwarg_mbs, target_mbs, loss_fn, loss_kwargs, training, return_outputs)
            if training and self._tied:
                self._tied.reduce()
        except BaseException as error:
            raise self._end(error, executor) from error.__cause__
        finally:
            if measuring:
                self._set_meter(None)
        self._last = executor
        self._step += 1
        if self._lookout is not None:
            self._lookout.step_ended()
        holds_last = any(stage.is_last for stage in self._stages)
        outputs, losses = executor.take_outputs(), executor.take_losses()
        return StepResult(
            outputs if holds_last and return_outputs else None, [loss for loss in losses if loss is not None]
        )

    def began(self) -> bool:
        """Whether the other ranks know of this runtime: its first step was begun."""
        return self._agreement is not None

    def refuse(self, error: Exception) -> None:
        """Tell the other ranks, once the first step was begun, that this one cannot take part in a step, and why."""
        self._over = True
        if self._agreement is not None:
            self._agreement.watch.publish(FailureRecord.of(error, self._rank).to_text())

    def over(self) -> bool:
        """Whether a failure ended this runtime."""
        return self._over

    @property
    def deadline(self) -> float:
        """Seconds that this rank waits for another before it raises an error that says who waits for whom."""
        return self._deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self._deadline = checked_deadline(seconds, "deadline")
        if self._agreement is not None:
            self._agreement.deadline = seconds
        if self._lookout is not None:
            self._lookout.deadline_changed()

    # Timeline

    @property
    def record_timeline(self) -> bool:
        """Whether steps record when each action began and ended."""
        return self._recording

    @record_timeline.setter
    def record_timeline(self, enabled: bool) -> None:
        self._recording = enabled
        for executor in self._executors.values():
            executor.set_recording(enabled)

    def timeline(self) -> Timeline:
        """What this rank did in its last step."""
        if self._timeline is None:
            records = [] if self._last is None else self._last.take_trace()
            actions = [record for record in records if "HAND_" not in record[0]]
            self._timeline = Timeline.from_records(self._rank, actions)
        return self._timeline

    # Metrics

    def metrics(self, work: Work) -> StepMetrics | None:
        """What this rank's last step took; None before the first one, and where it failed."""
        if self._last is None or self._agreement is None:
            return None
        return metrics_of(self._last, self.timeline, work, rank=self._rank, ranks=self._agreement.size)

    # Memory

    def memory_report(self, signature: Signature | None = None, *, torch_keeps_sent: bool = True) -> MemoryReport:
        """What the messages of a step take: on every rank for a signature, or on this one as the first step had it."""
        plan = self._plan
        if signature is not None:
            report = plan_memory(plan, loads_of(signature, plan.wiring.edges), torch_keeps_sent=torch_keeps_sent)
        elif self._meter is not None:
            loads = self._meter.loads(plan.wiring, {stage.stage_index for stage in self._stages})
            report = plan_memory(plan, loads, [self._rank], torch_keeps_sent=torch_keeps_sent)
        else:
            raise PipelineModeError(
                "no step was measured yet: give memory_report the tensors that one microbatch sends from stage to "
                "stage, or call it after the first step"
            )
        if self._executors:
            plan.release()
        return report

    def _set_meter(self, meter: Meter | None) -> None:
        """Measure what the stages take and give, from now on or no more; it costs, so one step does it."""
        self._meter = meter or self._meter
        for stage in self._stages:
            stage._meter = meter
            stage.refresh()

    # Beginning and end

    def _begin(self) -> None:
        if self._over:
            raise PipelineModeError("an earlier step of this schedule failed: make a new schedule")
        if self._agreement is None:
            check_ranks_exist(group_or_world(self._group))
            # First, so that whatever fails from here on can be told to the other ranks.
            self._agreement = Agreement.begin(self._group, self._deadline)
        replaced = [stage.replaced() for stage in self._stages]
        if replaced != self._replaced:
            self._executors.clear()
            self._replaced = replaced
        if not self._executors:
            self._open()

    def _open(self) -> None:
        assert self._agreement is not None
        if self._channels is None:
            self._check_claims(self._agreement)
        handlers = self._handlers()
        programs = {
            training: self._plan.lower(self._rank, training=training, handlers=handlers)
            for training in {self._has_backward, False}
        }
        if self._channels is None:
            # The training program's channels serve evaluations too: those use some of them.
            self._channels = open_channels(
                self._agreement,
                self._group,
                self._stages[0].device,
                programs[self._has_backward].send_channels,
                programs[self._has_backward].receive_channels,
                self._plan,
            )
        self._executors = {training: self._build(lowered, self._channels) for training, lowered in programs.items()}
        self._plan.release()

    def _handlers(self) -> Handlers:
        methods = {
            (stage.stage_index, kind): method
            for stage, replaced in zip(self._stages, self._replaced, strict=True)
            for kind, method in self._method_handlers(stage, replaced).items()
        }
        return Handlers(self._custom_functions, methods, data_parallel_handlers(self._stages))

    def _check_claims(self, agreement: Agreement) -> None:
        plan = self._plan
        own = Claim(
            stages=tuple(stage.stage_index for stage in self._stages),
            num_stages=self._stages[0].num_stages,
            num_microbatches=plan.num_microbatches,
            placement=tuple(plan.placement),
            has_backward=self._has_backward,
            order=fingerprint(plan.order),
            schedule=self._name,
        )
        ties = claims_of(self._stages)
        words = agreement.exchange("claim", {**asdict(own), "ties": [asdict(tie) for tie in ties]})
        tied = [read_claims(word.pop("ties")) for word in words]
        claims = [
            Claim(**{**word, "stages": tuple(word["stages"]), "placement": tuple(word["placement"])}) for word in words
        ]
        check_claims(claims)
        check_orders(claims, plan.order, agreement.exchange)
        self._tied = TiedGradients(self._stages, tied, self._rank)
        if self._tied:
            self._tied.connect(group_or_world(self._group))

    def _build(self, lowered: Lowered, channels: OpenChannels) -> _C.Executor:
        executor = _C.Executor(
            lowered.numbers,
            [stage._core for stage in self._stages],
            self._plan.wiring.core_edges(),
            [channels.senders[channel] for channel in lowered.send_channels],
            [channels.receivers[channel] for channel in lowered.receive_channels],
            lowered.callbacks,
            lowered.callback_names,
            self._plan.num_microbatches,
            channels.confirmation,
            None if channels.lookout is None else channels.lookout.board,
            channels.lanes,
            None if self._agreement is None else self._agreement.watch,
        )
        executor.set_recording(self._recording)
        return executor

    @property
    def _lookout(self) -> Lookout | None:
        return None if self._channels is None else self._channels.lookout

    def _end(self, error: BaseException, executor: _C.Executor | None) -> BaseException:
        """What to raise for an error on this rank, after every other rank was told of it."""
        self._over = True
        raised = end_of_step(error, _place(executor), self._agreement, self._lookout)
        if executor is not None:
            executor.clear()
            # Some microbatches' gradients are in and others are not, so none are left for an optimizer to use.
            for stage in self._stages:
                for module in stage.modules():
                    module.zero_grad(set_to_none=True)
        return raised


def _place(executor: _C.Executor | None) -> dict[str, Any]:
    """Stage, microbatch and action of the instruction that an executor stopped at."""
    if executor is None or executor.position < 0:
        return {}
    position = executor.position
    stage, microbatch = executor.stage_index_of(position), executor.microbatch_of(position)
    return {
        "stage": stage if stage >= 0 else None,
        "microbatch": microbatch if microbatch >= 0 else None,
        "action": executor.text_of(position),
    }
