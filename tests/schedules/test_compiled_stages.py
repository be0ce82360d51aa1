"""Compiled stages in every schedule, wrapped in every way: the plain model's gradients, from backwards that are cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from tests.helpers import api, ranks
from tests.helpers.pipelines import EVERY_SCHEDULE, SPLITTING, Setting, Twins, stages_allowed
from tests.helpers.wrapped_models import KINDS, ON_8_RANKS, WRAPPERS, compare_with_plain

WARM = f"{WRAPPERS} torch._dynamo torch._functorch.aot_autograd torch._inductor.compile_fx"
pytestmark = api.ours_only("refuses compiled stages in split backwards")

EAGER = {"compiler": "aot_eager"}
BROKEN_UP = {"FSDP2 of the blocks, after"}  # each product is FSDP2's, which its hooks keep out of compiled regions


def _count_runs() -> Counter[str]:
    """Weight gradients of compiled regions from now on: cut, or made in I."""
    from pp_runtime.running.compiled import requests

    runs: Counter[str] = Counter()
    run = requests.Request.weight_gradients

    def counted(self: Any) -> Any:
        runs["whole" if self._halves is None else "cut"] += 1
        return run(self)

    requests.Request.weight_gradients = counted  # type: ignore[method-assign]
    return runs


def _train(rank: int, schedules: list[str], model: str) -> list[str]:
    torch._dynamo.config.cache_size_limit = 1000
    runs, found = _count_runs(), list[str]()
    for schedule in schedules:
        torch._dynamo.reset()
        runs.clear()
        twins = Twins(rank, Setting(schedule, 5 if schedule != "DualPipeV" else 6, stages_allowed(schedule)[-1], model))
        twins.schedule.compile_stages(options=EAGER)
        for number in range(2):
            found += twins.train(f"{schedule}, step {number}", twins.example.batch(12, number))
        found += twins.evaluate(f"{schedule}, evaluation", twins.example.batch(10, 7))
        has_input_half = schedule in SPLITTING and max(twins.mine) > 0
        if has_input_half and (not runs["cut"] or runs["whole"]):
            found.append(f"{schedule}: {dict(runs)}")
    return found


@pytest.mark.parametrize(
    ("model", "schedules"), [("mlp", EVERY_SCHEDULE), ("transformer", ["ZBVZeroBubble", "InterleavedZeroBubble"])]
)
def test_training_equals_the_plain_models(model: str, schedules: list[str]) -> None:
    results = ranks.run(_train, 2, timeout=110, schedules=schedules, model=model)
    assert results == [[]] * 2, "\n".join(line for result in results for line in result)


def _compile(module: nn.Module) -> None:
    module.compile(backend="pp_runtime", options=EAGER)


def _compare(rank: int, schedules: list[str], kinds: list[str]) -> list[str]:
    torch._dynamo.config.cache_size_limit = 1000
    runs, found = _count_runs(), list[str]()
    for schedule in schedules:
        for kind in kinds:
            torch._dynamo.reset()
            runs.clear()
            found += compare_with_plain(rank, schedule, kind, "scaled", _compile)[:3]
            if not runs["cut"] and kind not in BROKEN_UP:
                found.append(f"{schedule}, {kind}: nothing was cut")
    return found


@pytest.mark.parametrize(
    ("schedules", "kinds"),
    [
        (["ZBVZeroBubble"], list(KINDS)),
        (["InterleavedZeroBubble", "DualPipeV"], ["DDP", "FSDP2, after", "TP", "TP, DTensors between"]),
    ],
    ids=["every wrapping", "other schedules"],
)
def test_gradients_are_the_plain_models_however_stages_are_wrapped(schedules: list[str], kinds: list[str]) -> None:
    results = ranks.run(_compare, 4, timeout=115, schedules=schedules, kinds=kinds)
    assert results == [[]] * 4, "\n".join(line for result in results for line in result)


def test_gradients_of_stages_that_are_parallel_in_two_ways_are_the_plain_models() -> None:
    results = ranks.run(_compare, 8, timeout=115, schedules=["ZBVZeroBubble"], kinds=list(ON_8_RANKS))
    assert results == [[]] * 8, "\n".join(line for result in results for line in result)
