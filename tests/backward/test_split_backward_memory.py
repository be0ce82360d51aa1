"""Between I and W lives what W needs and no more, after W nothing; and time grows with the graph, not its square."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from pp_runtime._backward import stage_backward_input, stage_backward_weight


class Watched:
    """Tensors made in a forward, of which only the storage is watched: autograd keeps other tensors over it."""

    def __init__(self) -> None:
        self.storages: list[StorageWeakRef] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.storages.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def alive(self) -> int:
        gc.collect()
        return sum(not storage.expired() for storage in self.storages)


def input_half(
    forward: Callable[[torch.Tensor], torch.Tensor], weights: Iterable[nn.Parameter], *watched: Watched
) -> Any:
    x = torch.randn(4, 8, requires_grad=True)
    output = forward(x)
    assert all(each.alive() for each in watched)  # or the test would watch nothing
    groups = stage_backward_input([output], None, [x], iter(tuple(weights)))[1]
    return groups


def test_what_only_the_input_half_reads_is_released_after_it() -> None:
    saved = Watched()
    linear = nn.Linear(8, 8)
    # Both save their results, and the weight's gradient needs neither.
    groups = input_half(lambda x: saved(torch.softmax(saved(torch.tanh(linear(x))), -1)), linear.parameters(), saved)
    assert saved.alive() == 0
    stage_backward_weight(linear.parameters(), groups)


def test_a_layer_keeps_its_input_for_the_weight_half_and_not_its_weight() -> None:
    activations, copies = Watched(), Watched()
    weight = nn.Parameter(torch.randn(8, 8))
    groups = input_half(lambda x: activations(x * 2) @ copies(weight * 2), [weight], activations, copies)
    assert (activations.alive(), copies.alive()) == (1, 0)
    stage_backward_weight([weight], groups)
    assert activations.alive() == 0


def test_small_weight_gradients_are_made_at_once_so_that_nothing_large_waits() -> None:
    activations = Watched()
    norm = nn.LayerNorm(8)
    groups = input_half(lambda x: norm(activations(x * 2)), norm.parameters(), activations)
    assert activations.alive() == 0
    assert norm.weight.grad is None
    stage_backward_weight(norm.parameters(), groups)
    assert norm.weight.grad is not None


def test_a_graph_that_microbatches_share_is_kept_when_told() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    scaled = weight.exp()  # made once, used by two microbatches
    first, second = (input_half(lambda x: x @ scaled, [weight]) for _ in range(2))
    stage_backward_weight([weight], first, retain_graph=True)
    stage_backward_weight([weight], second)
    assert weight.grad is not None


def test_a_half_that_is_dropped_frees_its_tensors() -> None:
    activations = Watched()
    weight = nn.Parameter(torch.randn(8, 8))
    groups = input_half(lambda x: activations(x * 2) @ weight, [weight], activations)
    assert activations.alive() == 1
    del groups
    assert activations.alive() == 0


def test_a_graph_too_deep_for_recursion() -> None:
    layer = nn.Linear(8, 8)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20_000):
            x = layer(x)
        return x

    stage_backward_weight(layer.parameters(), input_half(forward, layer.parameters()))
    input_half(forward, layer.parameters())  # dropped before W


def seconds(depth: int) -> float:
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    best = float("inf")
    for _ in range(3):
        x = torch.zeros(1, 4, requires_grad=True)
        output = layers(x)
        start = time.perf_counter()
        stage_backward_weight(layers.parameters(), stage_backward_input([output], None, [x], layers.parameters())[1])
        best = min(best, time.perf_counter() - start)
    return best


def test_time_grows_with_depth_and_not_with_its_square() -> None:
    # Sixteen times the layers: sixteen times the time, where a quadratic walk would take 256 times.
    assert seconds(1600) < 64 * seconds(100)


def test_the_inputs_gradient_is_its_takers_alone() -> None:
    made = Watched()
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))  # the linear layer saves a result of the norm
    x = torch.randn(4, 8, requires_grad=True)
    (gradient,), groups = stage_backward_input([module(x)], None, [x], module.parameters())
    assert gradient is not None
    made(gradient)
    x.grad = gradient = None
    assert made.alive() == 0
    stage_backward_weight(module.parameters(), groups)
