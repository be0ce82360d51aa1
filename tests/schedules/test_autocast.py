"""A step inside of autocast: the casts of weights that autocast keeps are shared by all microbatches."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import api, ranks, reference
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    backward_orders,
    held_by,
    make_schedule,
    make_stages,
    stages_allowed,
    step,
)

pytestmark = api.ours_only("is shown by torch's own tests")

MICROBATCHES, ROWS, WIDTH = 4, 8, 8


def _model(stages: int) -> list[nn.Module]:
    torch.manual_seed(6)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(stages)]


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(output.float(), target)


def _train(rank: int, schedules: list[str]) -> list[str]:
    found = []
    for name in schedules:
        per_rank = stages_allowed(name, 2)[-1]
        plain = _model(2 * per_rank)
        held = held_by(rank, name, 2, per_rank)
        modules = {index: copy.deepcopy(plain[index]) for index in held}
        stages = make_stages(modules, len(plain))
        schedule = make_schedule(name, stages, MICROBATCHES, _loss)
        for number in range(2):
            generator = torch.Generator().manual_seed(number)
            x, y = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
            batch = reference.Batch((x,), y)
            for module in modules.values():
                module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                reference.train_step(plain, batch, _loss, MICROBATCHES, backward_orders(schedule))
            with torch.autocast("cpu", torch.bfloat16):
                step(schedule, stages, batch)
            for index, module in modules.items():
                for (key, mine), theirs in zip(module.named_parameters(), plain[index].parameters(), strict=True):
                    found += reference.differences(f"{name}, step {number}: {index} {key}", mine.grad, theirs.grad)
    return found


def test_a_step_inside_of_autocast_equals_the_plain_models() -> None:
    assert ranks.run(_train, 2, schedules=EVERY_SCHEDULE) == [[]] * 2
