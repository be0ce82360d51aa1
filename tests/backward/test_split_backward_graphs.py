"""Random graphs of operations with shared weights: a split backward is a whole one."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.backward_halves import assert_same, split, whole

SIZE = 4


class Twice(torch.autograd.Function):
    """A Python Function with two inputs and two outputs."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx, product, total):
        x, y = ctx.saved_tensors
        return product * y + total, product * x + total


OPERATIONS = {
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "matmul": lambda x, y: x @ y,
    "addmm": lambda x, y: torch.addmm(x, y, x),
    "transpose": lambda x, y: x.t(),
    "tanh": lambda x, y: torch.tanh(x),
    "cat": lambda x, y: torch.cat([x[:2], y[2:]]),
    "norm": lambda x, y: nn.functional.layer_norm(x, (SIZE,), y[0]),
    "function": lambda x, y: sum(Twice.apply(x, y)),
    "in place": lambda x, y: torch.tanh(x).clone().add_(y),
    "into a view": lambda x, y: _into_view(x, y),
    "no gradient": lambda x, y: x.detach() + y,
}


def _into_view(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    result = x.clone()
    result[1] = y[0]
    return result


class Graph(nn.Module):
    """Values are inputs, weights and results of operations; the outputs are the last values."""

    def __init__(self, weights: int, steps: list[tuple[str, int, int]], outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrices = nn.ParameterList(
            nn.Parameter(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) / 2) for _ in range(weights)
        )
        self.steps, self.outputs = steps, outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [*inputs, *self.matrices]
        for name, left, right in self.steps:
            values.append(OPERATIONS[name](values[left % len(values)], values[right % len(values)]))
        return tuple(values[-self.outputs :])


steps = st.lists(st.tuples(st.sampled_from(list(OPERATIONS)), st.integers(0, 40), st.integers(0, 40)), max_size=14)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    needs=st.lists(st.booleans(), min_size=1, max_size=3),
    weights=st.integers(0, 3),
    steps=steps,
    outputs=st.integers(1, 3),
    absent=st.sets(st.integers(0, 2)),
)
def test_split_backward_of_a_random_graph_is_the_whole_one(
    needs: list[bool], weights: int, steps: list[tuple[str, int, int]], outputs: int, absent: set[int]
) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in needs]
    for tensor, need in zip(inputs, needs, strict=True):
        tensor.requires_grad_(need)
    model = Graph(weights, steps, outputs)
    count = len(model(*inputs))
    gradients = [None if i in absent else torch.full((SIZE, SIZE), i + 1.0, dtype=torch.float64) for i in range(count)]
    assert_same(whole(model, inputs, gradients), split(model, inputs, gradients))
