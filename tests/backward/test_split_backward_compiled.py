"""Compiled regions: their backward makes all gradients at once, in I; the weights' are kept for W."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from pp_runtime._backward import stage_backward_input, stage_backward_weight
from tests.helpers.backward_halves import assert_same, split, whole


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def blocks(count: int = 2) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8)) for _ in range(count))
    )


def an_input() -> torch.Tensor:
    return torch.randn(4, 8, requires_grad=True)


def test_compiled_stage() -> None:
    model = torch.compile(blocks(), backend="aot_eager")
    inputs = [an_input()]
    assert_same(whole(model, inputs), split(model, inputs))


def test_stage_compiled_in_place() -> None:
    model = blocks()
    inputs = [an_input()]
    expected = whole(model, inputs)
    model.compile(backend="aot_eager")
    assert_same(expected, split(model, inputs))


def test_compiled_blocks_inside_an_eager_stage() -> None:
    model = nn.Sequential(nn.Linear(8, 8), *blocks(2), nn.Linear(8, 8))
    model[1].compile(backend="aot_eager")
    model[2] = torch.compile(model[2], backend="aot_eager")
    inputs = [an_input()]
    assert_same(whole(model, inputs), split(model, inputs))


def test_compiled_function_over_a_weight_that_eager_code_uses_too() -> None:
    @torch.compile(backend="aot_eager")
    def attend(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ weight, -1) @ weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(attend(self.layer(x), self.layer.weight))

    model = Model()
    inputs = [an_input()]
    assert_same(whole(model, inputs), split(model, inputs))


def test_weight_hooks_of_a_compiled_stage_fire_in_the_weight_half() -> None:
    model = blocks(1)
    seen: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda weight, name=name: seen.update([name]))
    model.compile(backend="aot_eager")
    x = an_input()
    groups = stage_backward_input([model(x)], None, [x], model.parameters())[1]
    assert not seen
    stage_backward_weight(model.parameters(), groups)
    assert seen == {name: 1 for name, _ in model.named_parameters()}


def test_compiled_first_stage() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), blocks(1))
    inputs = [torch.randint(9, (3,))]
    expected = whole(model, inputs)
    model.compile(backend="aot_eager")
    assert_same(expected, split(model, inputs))


def test_compiled_backward_may_reuse_its_saved_tensors() -> None:
    # A compiled backward that overwrites what it saved (donated buffers) runs only where the graph is not kept.
    kept: list[bool] = []

    def compile_backward(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*tensors: torch.Tensor) -> Any:
            kept.append(torch._C._autograd._get_current_graph_task_keep_graph())
            return graph(*tensors)

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=compile_backward)
    model = nn.Sequential(blocks(1), torch.compile(blocks(1), backend=backend), blocks(1))
    inputs = [an_input()]
    assert_same(whole(model, inputs), split(model, inputs))
    assert kept == [False, False]
