"""Stages and a runtime without processes, for tests of what schedules do before and after the runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

import pp_runtime.schedules.base
from pp_runtime.orders.ir import Action, Order
from pp_runtime.stage import _PipelineStageBase


class FakeStage(_PipelineStageBase):
    """A stage that says where it is and runs nothing."""

    has_backward = False
    stage_index = 0
    num_stages = 1

    def __init__(self, stage_index: int, num_stages: int, group_rank: int = 0, group_size: int = 1) -> None:
        self.stage_index, self.num_stages = stage_index, num_stages
        self.group_rank, self.group_size = group_rank, group_size
        self.group = None
        self.output_chunks: list[Any] = []
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.scaled: list[int] = []
        self.submod = torch.nn.Identity()
        self._core = SimpleNamespace(set_loss=lambda microbatch, loss: None, follow_leaves=lambda leaves: None)
        self._ties: dict[str, list[str]] = {}
        self._loss_modules = ()
        self._gradients = None
        self._make_caches()

    def adapter(self) -> None:
        return None

    def refresh(self) -> None:
        pass

    def scale_grads(self, grad_scale_factor: int) -> None:
        self.scaled.append(grad_scale_factor)


@dataclass
class FakeResult:
    outputs: list[Any] | None
    losses: list[torch.Tensor]


class FakeRuntime:
    """Doubles each microbatch's first input on a rank with all stages, and remembers how it was called."""

    made: list[FakeRuntime] = []

    def __init__(
        self,
        stages: Sequence[Any],
        order: Order,
        placement: tuple[int, ...],
        num_microbatches: int,
        *,
        has_backward: bool = True,
        with_comms: bool = False,
        custom_functions: dict[Any, Callable[..., None]] | None = None,
        rebuild_order: Callable[[], Order] | None = None,
        method_handlers: Callable[..., Any] | None = None,
        name: str = "",
    ) -> None:
        self.stages, self.order, self.placement = list(stages), order, placement
        self.has_backward, self.with_comms = has_backward, with_comms
        self.custom_functions, self.rebuild_order = custom_functions or {}, rebuild_order
        self.record_timeline = False
        self.steps: list[dict[str, Any]] = []
        self.refused: list[Exception] = []
        FakeRuntime.made.append(self)

    def step(self, arg_mbs: list[tuple], kwarg_mbs: list[dict], target_mbs: list | None, **how: Any) -> FakeResult:
        self.steps.append({"args": arg_mbs, "kwargs": kwarg_mbs, "targets": target_mbs, **how})
        for action in self._own_actions():
            handler = self.custom_functions.get(action.computation_type)
            if handler is not None:
                handler(action)
        if not any(stage.is_last for stage in self.stages):
            return FakeResult(None, [])
        outputs = [2 * args[0] if args else torch.zeros(1) for args in arg_mbs]
        losses = []
        if how["loss_fn"] is not None and target_mbs is not None:
            pairs = zip(outputs, target_mbs, strict=True)
            losses = [how["loss_fn"](o, t, **(how["loss_kwargs"] or {})).detach() for o, t in pairs]
        return FakeResult(outputs if how["return_outputs"] else None, losses)

    def over(self) -> bool:
        return False

    def began(self) -> bool:
        return True

    def refuse(self, error: Exception) -> None:
        self.refused.append(error)

    def timeline(self) -> str:
        return "timeline"

    def metrics(self, work: Any) -> str | None:
        return f"metrics of {work.tokens} tokens" if self.steps else None

    def _own_actions(self) -> list[Action]:
        return self.order[self.stages[0].group_rank]


def use_fake_runtime(monkeypatch: Any) -> None:
    """Have schedules made in this test run on ``FakeRuntime``; ``FakeRuntime.made`` holds those made."""
    monkeypatch.setattr(pp_runtime.schedules.base, "Runtime", FakeRuntime)
    monkeypatch.setattr(FakeRuntime, "made", [])


def stages_of_rank(rank: int, ranks: int, stages: int, placement: Sequence[int] | None = None) -> list[FakeStage]:
    """The stages of a rank: looped, or as a placement says."""
    owners = placement if placement is not None else [stage % ranks for stage in range(stages)]
    return [FakeStage(stage, stages, rank, ranks) for stage, owner in enumerate(owners) if owner == rank]
