"""Methods that a program replaced, on a subclass or on the object: called as torch calls them, or refused by name."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pp_runtime.stage import PipelineStage
from tests.helpers import ranks, reference
from tests.helpers.fakes import FakeStage
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    Setting,
    Twins,
    held_by,
    make_schedule,
    make_stages,
    placement,
    stages_allowed,
)

MICROBATCHES = 4
CALLS: Counter[str] = Counter()


def _counted(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return getattr(PipelineStage, name)(self, *args, **kwargs)

    return method


def _own_backward(self: Any, backward_type: str, bwd_kwargs: dict, last_backward: bool = False) -> Any:
    """The way NeMo's expert-parallel stages write it: the backward itself, around which they call their wrappers."""
    from pp_runtime._backward import stage_backward, stage_backward_input, stage_backward_weight

    CALLS["backward_maybe_with_nosync"] += 1
    if backward_type == "full":
        outputs, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        return stage_backward(outputs, gradients, bwd_kwargs["input_values"]), None
    if backward_type == "input":
        return stage_backward_input(
            bwd_kwargs["stage_output"],
            bwd_kwargs["output_grads"],
            bwd_kwargs["input_values"],
            self.submod.parameters(),
        )
    return stage_backward_weight(self.submod.parameters(), bwd_kwargs["param_groups"]), None


# The chunk methods of torch's form, each replaced by one that does the same.
REPLACEMENTS: dict[str, Callable[..., Any]] = {
    **{
        name: _counted(name)
        for name in (
            "forward_one_chunk",
            "backward_one_chunk",
            "backward_weight_one_chunk",
            "forward_maybe_with_nosync",
            "_retrieve_recv_activations",
            "_retrieve_recv_grads",
        )
    },
    "backward_maybe_with_nosync": _own_backward,
}


def _train_replaced(rank: int, schedules: list[str], model: str) -> list[str]:
    """Replace one method, on one stage, before some steps and take it back before others: equal to the plain model."""
    found = []
    for name in schedules:
        for method, replacement in REPLACEMENTS.items():
            twins = Twins(rank, Setting(name, MICROBATCHES, stages_allowed(name, 2)[-1], model=model))
            for step in range(3):
                CALLS.clear()
                for stage in twins.stages:
                    stage.__dict__.pop(method, None)
                    if step != 1:
                        setattr(stage, method, MethodType(replacement, stage))
                batch = twins.example.batch(2 * MICROBATCHES, step)
                found += [f"{name}, {method}: {line}" for line in twins.train(f"step {step}", batch)]
                if (CALLS[method] == 0) != (step == 1) and not _is_idle(twins, name, method):
                    found.append(f"{name}, {method}: step {step} called it {CALLS[method]} times")
            found += twins.evaluate(f"{name}, {method}: eval", twins.example.batch(MICROBATCHES, 9))
    return found


def _is_idle(twins: Any, schedule: str, method: str) -> bool:
    """Whether the stages of this rank have nothing to call it for."""
    own = twins.schedule.pipeline_order[twins.stages[0].group_rank]
    splits = any("W" in str(action) for action in own)
    first, last = all(stage.is_first for stage in twins.stages), all(stage.is_last for stage in twins.stages)
    return (
        (method == "backward_weight_one_chunk" and not splits)
        or (method == "_retrieve_recv_activations" and first)
        or (method == "_retrieve_recv_grads" and last)
    )


@pytest.mark.parametrize("model", ["mlp", "tuples"])
@pytest.mark.parametrize("schedules", [EVERY_SCHEDULE[:6], EVERY_SCHEDULE[6:]], ids=["some", "others"])
def test_replaced_chunk_methods_are_called_and_train_alike(schedules: list[str], model: str) -> None:
    assert ranks.run(_train_replaced, 2, timeout=110, schedules=schedules, model=model) == [[]] * 2


class _Halves(PipelineStage):
    """Halves what it gives, which a runtime that passes the method over does not."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if self.is_last:
            return output / 2
        outputs, inputs = self.fwd_cache[fwd_chunk_id]
        self.fwd_cache[fwd_chunk_id] = (tuple(each / 2 for each in outputs), inputs)
        return output


def _train_halves(rank: int, schedules: list[str]) -> list[str]:
    found = []
    for name in schedules:
        per_rank = stages_allowed(name, 2)[-1]
        torch.manual_seed(5)
        modules = [nn.Linear(4, 4) for _ in range(2 * per_rank)]
        plain = copy.deepcopy(modules)
        held = held_by(rank, name, 2, per_rank)
        stages = [_Halves(modules[i], i, len(modules), torch.device("cpu")) for i in held]
        schedule = make_schedule(name, stages, 1, nn.functional.mse_loss)
        x, y = torch.randn(2, 4), torch.randn(2, 4)
        value = x
        for module in plain:
            value = module(value) / 2
        nn.functional.mse_loss(value, y).backward()
        first, last = 0 in held, len(modules) - 1 in held
        schedule.step(*((x,) if first else ()), **({"target": y} if last else {}))
        for index in held:
            for got, wanted in zip(modules[index].parameters(), plain[index].parameters(), strict=True):
                found += reference.differences(f"{name}, stage {index}", got.grad, wanted.grad)
    return found


class _OwnLoss:
    """Replaces a schedule's computation of the loss."""

    def _compute_loss(self, output: Any, target: Any, loss_kwargs: Any = None) -> Tensor:
        return 3 * super()._compute_loss(output, target, loss_kwargs)  # type: ignore[misc]


def _counting_maybe(schedule: Any, *args: Any) -> None:
    CALLS["_maybe_compute_loss"] += 1
    type(schedule)._maybe_compute_loss(schedule, *args)


def _train_own_loss(rank: int, schedules: list[str], way: str) -> list[str]:
    found = []
    for name in schedules:
        twins = Twins(rank, Setting(name, MICROBATCHES, stages_allowed(name, 2)[-1]))
        plain_loss, schedule = twins.example.loss_fn, twins.schedule
        object.__setattr__(twins.example, "loss_fn", lambda output, target, loss=plain_loss: 3 * loss(output, target))
        if way == "class":
            schedule.__class__ = type("Own", (_OwnLoss, type(schedule)), {})
        elif way == "object":
            schedule._compute_loss = lambda output, target, loss_kwargs=None, loss=plain_loss: 3 * loss(output, target)
        else:
            schedule._maybe_compute_loss = partial(_counting_maybe, schedule)
            schedule._loss_fn = twins.example.loss_fn
        for step in range(2):
            found += [f"{name}: {line}" for line in twins.train(f"step {step}", twins.example.batch(8, step))]
    if way == "maybe" and rank in {placement(name, 2, stages_allowed(name, 2)[-1])[-1] for name in schedules}:
        assert CALLS["_maybe_compute_loss"] > 0
    return found


@pytest.mark.parametrize("way", ["class", "object", "maybe"])
def test_a_replaced_loss_is_the_loss(way: str) -> None:
    assert ranks.run(_train_own_loss, 2, schedules=EVERY_SCHEDULE, way=way) == [[]] * 2


class _Scales(PipelineStage):
    """Its own way to scale: as the base class, and once more."""

    def scale_grads(self, grad_scale_factor: int) -> None:
        super().scale_grads(grad_scale_factor)
        for parameter in self.submod.parameters():
            parameter.grad.mul_(grad_scale_factor)


class _Reduces(PipelineStage):
    """Its own way to reduce, which leaves the gradients as they are."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        super().perform_reduce_grad(1)
        self._gradients.scale(self.submod.parameters(), 1)


def _train_unscaled(rank: int, schedules: list[str], kind: str) -> list[str]:
    found = []
    for name in schedules:
        setting = Setting(name, MICROBATCHES, stages_allowed(name, 2)[-1])
        twins = Twins(rank, setting)
        twins.scale = False
        for stage in twins.stages:
            stage.__class__ = _Scales if kind == "scale_grads" else _Reduces
        for step in range(2):
            found += [f"{name}: {line}" for line in twins.train(f"step {step}", twins.example.batch(8, step))]
    return found


@pytest.mark.parametrize("kind", ["scale_grads", "perform_reduce_grad"])
def test_a_replaced_way_to_scale_or_to_reduce_is_called(kind: str) -> None:
    assert ranks.run(_train_unscaled, 2, schedules=EVERY_SCHEDULE, kind=kind) == [[]] * 2


def test_what_a_stage_keeps_in_torchs_caches_is_what_is_sent() -> None:
    assert ranks.run(_train_halves, 2, schedules=EVERY_SCHEDULE) == [[]] * 2


@pytest.mark.parametrize("name", ["get_fwd_send_ops", "get_bwd_recv_ops", "set_local_fwd_input"])
def test_methods_that_would_be_passed_over_are_refused_when_a_schedule_is_made(name: str) -> None:
    stage = FakeStage(0, 1)
    stage.__class__ = type("Own", (FakeStage,), {name: lambda self, *args: []})
    with pytest.raises(ValueError, match=rf"Own replaces {name} of stage 0.*replace one of forward_one_chunk"):
        make_schedule("GPipe", [stage], 2, None)


def _refused_later(rank: int) -> str:
    stage = make_stages({rank: nn.Linear(2, 2)}, 2)[0]
    schedule = make_schedule("GPipe", [stage], 2, nn.functional.mse_loss)
    if rank == 1:
        stage.get_fwd_recv_ops = lambda microbatch: []
    x = torch.randn(2, 2)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        schedule.step(*((x,) if rank == 0 else ()), **({"target": x} if rank else {}))
    return str(raised.value)


def test_one_that_is_replaced_later_is_refused_at_the_next_step_on_every_rank() -> None:
    assert all("replaces get_fwd_recv_ops of stage 1" in message for message in ranks.run(_refused_later, 2))


def _train_with_a_pool(rank: int) -> list[str]:
    """A program that puts a pool of receive buffers where torch makes them, on the class, as NeMo AutoModel does."""
    original = PipelineStage._prepare_forward_infra
    try:
        PipelineStage._prepare_forward_infra = lambda self, *args: 1 / 0  # type: ignore[method-assign]
        twins = Twins(rank, Setting("1F1B", MICROBATCHES))
        with pytest.warns(UserWarning, match="_prepare_forward_infra of a stage was replaced and is not called"):
            return twins.train("a step", twins.example.batch(8, 0))
    finally:
        PipelineStage._prepare_forward_infra = original  # type: ignore[method-assign]


def test_a_pool_of_receive_buffers_in_torchs_place_changes_nothing_and_is_told_so() -> None:
    assert ranks.run(_train_with_a_pool, 2) == [[]] * 2
