"""What a model costs along its layers: each part its own, alike of a model with values and of one without them."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from pp_runtime import layer_costs, without_weights
from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting import model_costs
from tests.helpers import api
from tests.helpers.layered_huggingface import LAYERS, LENGTH, MODELS, TOKENS, inputs_of

pytestmark = api.ours_only("cuts by no costs")
ROWS, WIDTH, OUT = 6, 8, 3


class Layer(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner, bias=False), nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(2, WIDTH, bias=False)
        self.layers = nn.ModuleList(Layer(inner) for inner in (WIDTH, 4 * WIDTH, 2 * WIDTH))
        self.leave = nn.Linear(WIDTH, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


X = torch.randn(ROWS, 2)


@pytest.mark.parametrize("kind", ["in memory", "without values"])
def test_parameters_flops_and_memory_of_each_part(kind: str) -> None:
    model = Model()
    if kind == "without values":
        with without_weights():
            model = Model()
    numbers = [2 * WIDTH, *(2 * WIDTH * WIDTH * times for times in (1, 4, 2)), OUT * WIDTH]
    found = {by: model_costs(model, by, (X,), {}) for by in ("parameters", "flops", "memory")}
    assert [found["parameters"].before, *found["parameters"].layers, found["parameters"].after] == numbers
    assert list(found["flops"].layers) == [2 * ROWS * number for number in numbers[1:-1]]
    assert (found["flops"].before, found["flops"].after) == (2 * ROWS * numbers[0], 2 * ROWS * numbers[-1])
    kept = [WIDTH * (1 + times) for times in (1, 4, 2)]  # the inputs of both products of a layer
    assert list(found["memory"].layers) == [
        4 * (2 * number + ROWS * row) for number, row in zip(numbers[1:-1], kept, strict=True)
    ]


def test_they_are_those_of_layer_costs_and_nothing_is_changed() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    hidden = torch.randn(ROWS, WIDTH)
    for by in ("parameters", "flops", "memory"):
        assert list(model_costs(model, by, (X,), {}).layers) == layer_costs(model.layers, by, (hidden,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "GPT-2", "Qwen2", "Mixtral"])
def test_hugging_face_models_without_values_are_measured(name: str) -> None:
    with without_weights():
        model = MODELS[name]().eval()
    for by in ("parameters", "flops", "memory"):
        found = model_costs(model, by, (inputs_of(name, 2),), {})
        assert len(found.layers) == LAYERS and len(set(found.layers[1:])) == 1  # the first keeps rotary tables of all
        assert min(found.layers) > 0
        assert found.after >= {"parameters": TOKENS * 32, "flops": 2 * 2 * LENGTH * TOKENS * 32, "memory": 0}[by]


def test_time_is_measured_where_there_is_some() -> None:
    class Slow(Layer):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.005)
            return super().forward(x)

    model = Model()
    model.layers[1].__class__ = Slow
    found = model_costs(model, "time", (X,), {}, "layers")
    assert found.layers[1] >= 0.005 and max(found.layers) == found.layers[1]
    with without_weights():
        model = Model()
    with pytest.raises(PipelineUsageError, match="no time to measure: take partition='flops'"):
        model_costs(model, "time", (X,), {})
