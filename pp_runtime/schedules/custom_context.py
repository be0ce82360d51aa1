"""What a user's own handler of an action is given, and the actions that may have one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import Action, ActionType, ir, leaves

CUSTOM_TYPES = (
    ir.FORWARD,
    ir.FULL_BACKWARD,
    ir.BACKWARD_INPUT,
    ir.BACKWARD_WEIGHT,
    ir.OVERLAP_F_B,
    ir.UNSHARD,
    ir.RESHARD,
    ir.REDUCE_GRAD,
)


@dataclass
class _PipelineContext:
    """The step that a handler runs in."""

    schedule_ref: Any  # the schedule itself
    arg_mbs: list[tuple] | None = None
    kwarg_mbs: list[dict] | None = None
    target_mbs: list | None = None
    losses: list | None = None


class _CustomFunctionProtocol(Protocol):
    """A handler does all that its action stands for; the runtime does the sends and receives around it."""

    def __call__(self, action: Action, ctx: _PipelineContext) -> None: ...


class CurrentStep:
    """The context of the step that runs now, shared by a schedule and its handlers.

    The handlers that the runtime holds point here and not at the schedule, so that a schedule that its user drops
    is freed at once, with its runtime.
    """

    def __init__(self) -> None:
        self.context: _PipelineContext | None = None
        self.return_outputs = True
        self.loss_kwargs: dict[str, Any] | None = None
        self.backwards_before: dict[Action, Counter[int]] = {}
        self.backward_counter: Counter[int] = Counter()

    def handler(self, function: _CustomFunctionProtocol) -> Callable[..., None]:
        """What the runtime calls for an action of the type that ``function`` was registered for."""

        def call(action: Action, *_: Any) -> None:
            if self.context is None:
                raise PipelineUsageError(f"the handler of {action} was called outside of a step")
            before = self.backwards_before.get(action)
            if before is not None:
                # Some backwards may run without a handler, and nobody counts those.
                self.backward_counter.clear()
                self.backward_counter.update(before)
            function(action, self.context)
            self.context.schedule_ref._take_appended_losses(action)

        return call


def backwards_before_each_action(actions: Sequence[Action]) -> dict[Action, Counter[int]]:
    """For each compute action of a rank, how many B and W each stage has done when it begins."""
    counts: Counter[int] = Counter()
    before: dict[Action, Counter[int]] = {}
    for action in actions:
        if action.is_compute_op:
            before[action] = Counter(counts)
        for part in leaves((action,)):
            if part.computation_type in (ir.FULL_BACKWARD, ir.BACKWARD_WEIGHT):
                counts[part.stage_index] += 1
    return before


def check_custom_type(computation_type: ActionType) -> ActionType:
    """The type, or an error if an action of this type cannot have a handler."""
    if computation_type not in CUSTOM_TYPES:
        names = ", ".join(kind.name for kind in CUSTOM_TYPES)
        raise PipelineUsageError(f"{computation_type!r} cannot have a custom function: choose one of {names}")
    return ActionType(computation_type)
