"""W accumulates into leaves itself where the engine would only be in the way, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pp_runtime._backward import stage_backward_input, stage_backward_weight
from tests.helpers.backward_halves import assert_split_is_whole

EVALUATED = "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad"


def an_input() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))


class UsesWeight(nn.Module):
    """Multiplies by one weight some times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.times = nn.Parameter(torch.randn(8, 8)), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = torch.tanh(x @ self.weight)
        return x


class UsesWeightScaled(nn.Module):
    """Multiplies by a weight, and by something made of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight) @ (self.weight * 2)


def leaves_left_to_the_engine(model: nn.Module) -> int:
    """How many leaves the engine looks after in W."""
    x = an_input()
    _, groups = stage_backward_input([model(x).sum()], None, [x], model.parameters())
    with profile(activities=[ProfilerActivity.CPU]) as events:
        stage_backward_weight(model.parameters(), groups)
    return sum(event.count for event in events.key_averages() if event.key == EVALUATED)


def test_plain_layers_leave_none_to_the_engine() -> None:
    model = layers()
    assert leaves_left_to_the_engine(model) == 0
    assert_split_is_whole(model, an_input())


def test_gradients_that_are_there_are_added_to() -> None:
    model = layers()
    once = {}
    for name, weight in model.named_parameters():
        once[name] = torch.full_like(weight, 0.5)
        weight.grad = once[name].clone()
    kept = {name: weight.grad for name, weight in model.named_parameters()}
    x = an_input()
    _, groups = stage_backward_input([model(x).sum()], None, [x], model.parameters())
    stage_backward_weight(model.parameters(), groups)
    for name, weight in model.named_parameters():
        assert weight.grad is kept[name]  # in place
        weight.grad = once[name].clone()
        once[name] = kept[name]
    model(an_input()).sum().backward()
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, once[name])


@pytest.mark.parametrize("times", [2, 3])
def test_a_weight_used_more_than_once_is_summed_by_the_engine(times: int) -> None:
    model = UsesWeight(times)
    assert leaves_left_to_the_engine(model) == 1
    assert_split_is_whole(model, an_input())


def test_a_weight_that_is_also_used_behind_an_operation_is_summed_by_the_engine() -> None:
    model = UsesWeightScaled()
    assert leaves_left_to_the_engine(model) == 1
    assert_split_is_whole(model, an_input())


def test_hooks_that_the_engine_calls_are_called_by_it() -> None:
    model = layers()
    seen = []
    first, last = model[0], model[-1]
    first.weight.register_hook(lambda gradient: seen.append("tensor"))
    leaf = last.bias.expand_as(last.bias).grad_fn.next_functions[0][0]
    leaf.register_hook(lambda inputs, outputs: seen.append("node"))
    assert leaves_left_to_the_engine(model) == 2
    assert sorted(seen) == ["node", "tensor"]
    assert_split_is_whole(model, an_input())


def test_hooks_after_the_accumulation_fire_once() -> None:
    model = layers()
    seen = []
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda leaf, name=name: seen.append((name, leaf.grad is not None)))
    assert leaves_left_to_the_engine(model) == 0
    assert sorted(seen) == sorted((name, True) for name, _ in model.named_parameters())


def test_a_failing_hook_is_raised() -> None:
    def fail(leaf: torch.Tensor) -> None:
        raise ValueError("no gradient today")

    model = layers()
    model[0].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ValueError, match="no gradient today"):
        leaves_left_to_the_engine(model)


def test_under_autocast() -> None:
    model = layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert leaves_left_to_the_engine(model) == 0
        assert_split_is_whole(model, an_input())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_detection_sees_every_node() -> None:
    with torch.autograd.detect_anomaly():
        assert leaves_left_to_the_engine(layers()) == 6
