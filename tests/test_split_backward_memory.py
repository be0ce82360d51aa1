"""Between I and W lives what W needs and no more, after W nothing; and time grows with the graph, not its square."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable

import torch
from torch import nn

from pp_runtime._backward import stage_backward_input, stage_backward_weight


def alive(tensors: list[weakref.ref]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in tensors)


def watch(tensor: torch.Tensor, into: list[weakref.ref]) -> torch.Tensor:
    into.append(weakref.ref(tensor))
    return tensor


def halves_with(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, weights: list[nn.Parameter]):
    return stage_backward_input([forward(x)], None, [x], iter(weights))[1]


def test_what_only_the_input_half_reads_is_released_after_it() -> None:
    saved: list[weakref.ref] = []
    linear = nn.Linear(8, 8)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = watch(torch.tanh(linear(x)), saved)  # tanh saves its result
        return watch(torch.softmax(y, -1), saved)

    groups = halves_with(forward, torch.randn(4, 8, requires_grad=True), list(linear.parameters()))
    assert alive(saved) == 0
    stage_backward_weight(linear.parameters(), groups)


def test_a_layer_keeps_its_input_for_the_weight_half_and_not_its_weight() -> None:
    activations: list[weakref.ref] = []
    copies: list[weakref.ref] = []
    weight = nn.Parameter(torch.randn(8, 8))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return watch(x * 2, activations) @ watch(weight * 2, copies)

    groups = halves_with(forward, torch.randn(4, 8, requires_grad=True), [weight])
    assert (alive(activations), alive(copies)) == (1, 0)
    stage_backward_weight([weight], groups)
    assert alive(activations) == 0


def test_small_weight_gradients_are_made_at_once_so_that_nothing_large_waits() -> None:
    activations: list[weakref.ref] = []
    norm = nn.LayerNorm(8)
    groups = halves_with(
        lambda x: norm(watch(x * 2, activations)), torch.randn(4, 8, requires_grad=True), list(norm.parameters())
    )
    assert alive(activations) == 0
    assert norm.weight.grad is None
    stage_backward_weight(norm.parameters(), groups)
    assert norm.weight.grad is not None


def test_the_weight_half_releases_as_it_goes_and_keeps_the_graph_when_told() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    scaled = weight.exp()  # made once, used by two microbatches
    groups = [halves_with(lambda x: x @ scaled, torch.randn(4, 8, requires_grad=True), [weight]) for _ in range(2)]
    stage_backward_weight([weight], groups[0], retain_graph=True)
    stage_backward_weight([weight], groups[1])
    assert weight.grad is not None


def test_a_half_that_is_dropped_frees_its_tensors() -> None:
    activations: list[weakref.ref] = []
    weight = nn.Parameter(torch.randn(8, 8))
    groups = halves_with(lambda x: watch(x * 2, activations) @ weight, torch.randn(4, 8, requires_grad=True), [weight])
    del groups
    assert alive(activations) == 0


def test_a_graph_too_deep_for_recursion() -> None:
    layer = nn.Linear(2, 2)

    def forward(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20_000):
            x = layer(x)
        return x

    groups = halves_with(forward, torch.zeros(1, 2, requires_grad=True), list(layer.parameters()))
    stage_backward_weight(layer.parameters(), groups)
    del groups
    groups = halves_with(forward, torch.zeros(1, 2, requires_grad=True), list(layer.parameters()))
    del groups


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
