"""Lengths may differ from microbatch to microbatch, and an output's shape may depend on the data, on every schedule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import api, ranks, reference
from tests.helpers.models import WIDTH
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    ONE_STAGE,
    backward_orders,
    differences_of_modules,
    held_by,
    make_schedule,
    make_stages,
    placement,
)
from tests.helpers.reference import Batch

pytestmark = api.ours_only("sizes its buffers once")

RANKS, MICROBATCHES = 2, 5
every_schedule = pytest.mark.parametrize("schedule", EVERY_SCHEDULE)


class Block(nn.Module):
    """Attends over a length that is its input's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ x.transpose(-1, -2), -1)
        return torch.tanh(self.linear(weights @ x))


class Keeps(nn.Module):
    """Drops the rows whose sum is negative, so that the data says how many there are; at least one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        kept = y.detach().sum(-1) >= 0
        kept[..., 0] = True
        return y[kept]


class Sometimes(nn.Module):
    """Uses its second input, and so gives it a gradient, only where the first one's sum says so."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.linear, self.other, self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), first, last

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        z = torch.tanh(self.linear(x))
        if y is not None and x.detach().sum() > 0:
            z = z + self.other(y)
        return z if self.last else (z, torch.tanh(self.other(x)))


def _modules(name: str, num_stages: int) -> list[nn.Module]:
    torch.manual_seed(3)
    if name == "lengths":
        return [Block() for _ in range(num_stages)]
    if name == "kept":
        return [Keeps() for _ in range(num_stages)]
    return [Sometimes(index == 0, index == num_stages - 1) for index in range(num_stages)]


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum()


def _microbatches(name: str, step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    batches = []
    for _ in range(MICROBATCHES):
        length = int(torch.randint(1, 9, (), generator=generator))
        shape = (2, length, WIDTH) if name == "lengths" else (length, WIDTH)
        batches.append(Batch((torch.randn(shape, generator=generator),), torch.randn(WIDTH, generator=generator)))
    return batches


def _expected(modules: list[nn.Module], batches: list[Batch], orders: dict[int, list[int]]) -> list[Tensor]:
    """The plain model's losses; its gradients, each stage adding up in its own order, are left on the parameters."""
    losses, gradients = [], []
    for batch in batches:
        for module in modules:
            module.zero_grad(set_to_none=True)
        loss = _loss(reference.forward(modules, batch), batch.target)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([[parameter.grad for parameter in module.parameters()] for module in modules])
    for index, module in enumerate(modules):
        module.zero_grad(set_to_none=True)
        for microbatch in orders.get(index, range(MICROBATCHES)):
            for parameter, gradient in zip(module.parameters(), gradients[microbatch][index], strict=True):
                if gradient is not None:
                    parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
    return losses


def _train(rank: int, schedule: str, name: str) -> list[str]:
    stages_per_rank = 1 if schedule in ONE_STAGE else 2
    num_stages = len(placement(schedule, RANKS, stages_per_rank))
    plain = _modules(name, num_stages)
    mine = {index: copy.deepcopy(plain[index]) for index in held_by(rank, schedule, RANKS, stages_per_rank)}
    stages = make_stages(mine, num_stages)
    pipeline = make_schedule(schedule, stages, MICROBATCHES, _loss, scale_grads=False)
    exact = name != "sometimes"  # there the two outputs' gradients meet in another order
    found: list[str] = []
    for number in range(3):
        batches = _microbatches(name, number)
        for module in mine.values():
            module.zero_grad(set_to_none=True)
        expected = _expected(plain, batches, backward_orders(pipeline))
        losses: list[Tensor] = []
        last = num_stages - 1 in mine
        pipeline.step(
            arg_mbs=[batch.args for batch in batches] if 0 in mine else None,
            target_mbs=[batch.target for batch in batches] if last else None,
            losses=losses if last else None,
            return_outputs=False,
        )
        if last:
            found += reference.differences(f"step {number} losses", losses, expected, exact)
        for index, module in mine.items():
            found += differences_of_modules(f"step {number}, stage {index}", module, plain[index], exact)
    return found


@every_schedule
def test_lengths_that_differ_from_microbatch_to_microbatch(schedule: str) -> None:
    assert ranks.run(_train, RANKS, schedule=schedule, name="lengths") == [[]] * RANKS


@every_schedule
def test_shapes_that_depend_on_the_data(schedule: str) -> None:
    assert ranks.run(_train, RANKS, schedule=schedule, name="kept") == [[]] * RANKS


@every_schedule
def test_an_output_that_gets_no_gradient_in_some_microbatches(schedule: str) -> None:
    assert ranks.run(_train, RANKS, schedule=schedule, name="sometimes") == [[]] * RANKS
