"""What layers cost: each measure tells a heavy layer from a light one, and by how much where that is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pp_runtime import layer_costs, partition
from pp_runtime.errors import PipelineUsageError
from tests.helpers import api

pytestmark = api.ours_only("measures no layers")


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return scale * self.down(self.up(x)), None


WIDTH, ROWS = 32, 6
LAYERS = [Block(WIDTH, WIDTH), Block(WIDTH, 4 * WIDTH), Block(WIDTH, 2 * WIDTH)]


def test_parameters_are_counted() -> None:
    assert layer_costs(LAYERS) == [2 * WIDTH * WIDTH * times for times in (1, 4, 2)]


def test_flops_are_those_of_the_products_and_nothing_is_computed() -> None:
    with torch.device("meta"):
        layers = [Block(WIDTH, WIDTH), Block(WIDTH, 4 * WIDTH)]
    found = layer_costs(layers, "flops", (torch.empty(ROWS, WIDTH, device="meta"), 2.0))
    assert found == [2 * 2 * ROWS * WIDTH * WIDTH * times for times in (1, 4)]


def test_memory_counts_weights_gradients_and_what_the_backward_needs() -> None:
    (found,) = layer_costs([Block(WIDTH, WIDTH)], "memory", (torch.randn(ROWS, WIDTH),))
    weights, kept = 2 * WIDTH * WIDTH, 2 * ROWS * WIDTH  # the inputs of both layers
    assert found == 4 * (2 * weights + kept)
    frozen = Block(WIDTH, WIDTH).requires_grad_(False)
    assert layer_costs([frozen], "memory", (torch.randn(ROWS, WIDTH),))[0] < found


def test_time_is_longer_for_a_layer_that_does_more() -> None:
    layers = [Block(256, 256), Block(256, 4096)]
    light, heavy = layer_costs(layers, "time", (torch.randn(64, 256),), repeats=9)
    assert 0 < light < heavy
    assert all(parameter.grad is None for layer in layers for parameter in layer.parameters())


def test_a_model_is_cut_by_what_its_layers_cost() -> None:
    made = partition(layer_costs(LAYERS), 2)
    assert made == (2, 1) and made.loads == (2 * WIDTH * WIDTH * 5, 2 * WIDTH * WIDTH * 2)


@pytest.mark.parametrize(("by", "words"), [("weight", "not 'weight'"), ("time", "need the first layer's inputs")])
def test_what_cannot_be_measured_is_said(by: str, words: str) -> None:
    with pytest.raises(PipelineUsageError, match=words):
        layer_costs(LAYERS, by)
