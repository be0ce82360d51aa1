"""The two halves of a backward make the gradients of the whole one, for models as people write them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pp_runtime._backward import stage_backward_input, stage_backward_weight
from tests.helpers.backward_halves import assert_split_is_whole, weights_of


def an_input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_blocks(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    assert_split_is_whole(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), an_input(2, 5, 16))


def test_decoder_with_two_inputs() -> None:
    decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    assert_split_is_whole(decoder, an_input(2, 5, 16), an_input(2, 7, 16))


def test_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.GroupNorm(2, 8), nn.GELU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 7 * 7, 5),
    )  # fmt: skip
    assert_split_is_whole(model, an_input(2, 3, 8, 8))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks(kind: type[nn.RNNBase]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = kind(6, 8, num_layers=2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)[0]

    assert_split_is_whole(Last(), an_input(3, 5, 6))


def test_experts_chosen_by_data() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.router(x).softmax(-1)
            best = scores.argmax(-1)
            result = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = (best == index).nonzero().flatten()
                if len(rows):
                    result = result.index_add(0, rows, expert(x[rows]) * scores[rows, index, None])
            return result

    model = Experts()
    assert_split_is_whole(model, an_input(3, 8))
    assert None in weights_of(model).values()  # an expert that was not chosen


def test_weight_of_several_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = torch.tanh(self.layer(x) * self.scale)
            return x @ self.layer.weight + self.scale

    assert_split_is_whole(Shared(), an_input(4, 8))


def test_weight_on_both_sides_of_a_frontier_node() -> None:
    class BothSides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # The first factor depends on input and weight, the second on the weight alone.
            return (x + self.weight) @ (self.weight.exp() @ self.weight)

    assert_split_is_whole(BothSides(), an_input(8, 8))


def test_weights_without_gradient_frozen_and_none_at_all() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(8, 8).requires_grad_(False)
            self.used = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(self.frozen(x))

    assert_split_is_whole(Partly(), an_input(4, 8))
    assert_split_is_whole(nn.Sequential(nn.GELU(), nn.Softmax(-1)), an_input(4, 8))
    assert_split_is_whole(nn.Linear(8, 8).requires_grad_(False), an_input(4, 8))


def test_first_stage_leaves_everything_to_the_weight_half() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    tokens = torch.randint(10, (2, 3))
    assert_split_is_whole(model, tokens)
    groups = stage_backward_input([model(tokens)], None, [tokens], model.parameters())[1]
    model.zero_grad()
    assert all(gradient is None for gradient in weights_of(model).values())
    stage_backward_weight(model.parameters(), groups)
    assert all(gradient is not None for gradient in weights_of(model).values())


def test_parameters_reached_only_beside_the_input() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 8)
            self.mix = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mix(self.table(torch.arange(5)))

    assert_split_is_whole(Positions(), an_input(2, 5, 8))


def test_several_inputs_and_outputs_and_a_gradient_that_is_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.left(x) + y, self.right(y), self.left.weight * 2, z

    inputs = (an_input(4, 8), an_input(4, 8), torch.randn(4, 8))
    gradients = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, 8), None]
    assert_split_is_whole(Two(), *inputs, gradients=gradients)
    assert_split_is_whole(Two(), *inputs, gradients=[torch.randn(4, 8), None, None, None])
    assert_split_is_whole(Two(), *inputs, gradients=[None, torch.randn(4, 8), None, None])
    assert_split_is_whole(Two(), *inputs, gradients=[None, None, torch.randn(8, 8), None])


def test_output_that_is_a_view_or_an_input() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 12)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first, second, third = self.layer(x).chunk(3, -1)
            return first.transpose(0, 1), second, third[0], x

    assert_split_is_whole(Views(), an_input(4, 8))


def test_in_place_operations() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.row = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu_(self.layer(x)).clone().mul_(2)
            x[0] = self.row * x[1].clone()
            x[1:].add_(self.row)
            return self.layer(x.clone())

    assert_split_is_whole(InPlace(), an_input(4, 8))


def test_products_with_more_than_two_dimensions() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Parameter(torch.randn(3, 8, 5))
            self.bias = nn.Parameter(torch.randn(3, 1, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.einsum("bi,hij->hbj", x, self.heads)
            y = y + torch.baddbmm(self.bias, x.expand(3, -1, -1), self.heads)
            return y + torch.addbmm(self.bias[0], x.expand(3, -1, -1), self.heads, beta=0.5)

    assert_split_is_whole(Products(), an_input(4, 8))


def test_bias_beside_a_product_of_activations() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, x.t())

    assert_split_is_whole(Attention(), an_input(4, 8))


def test_custom_functions_run_once() -> None:
    calls = []

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x * weight

        @staticmethod
        def backward(ctx, gradient):
            calls.append(ctx.needs_input_grad)
            x, weight = ctx.saved_tensors
            return gradient * weight, (gradient * x).sum(0)

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Scale.apply(self.layer(Scale.apply(x, self.scale)), self.scale)

    assert_split_is_whole(Custom(), an_input(4, 8))
    assert calls == [(True, True)] * 4  # two Functions, whole and split


def test_autocast() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layers(x).float()

    assert_split_is_whole(Half(), an_input(4, 8))


def test_weight_half_runs_once_and_accumulates() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    halves = []
    for _ in range(3):  # all the inputs' halves first, as a zero-bubble schedule has it
        x = an_input(4, 8)
        halves.append((x, stage_backward_input([model(x)], None, [x], model.parameters())[1]))
    for _, groups in halves:
        stage_backward_weight(model.parameters(), groups)
    with pytest.raises(RuntimeError, match="runs once"):
        stage_backward_weight(model.parameters(), halves[0][1])
    found = {name: gradient.clone() for name, gradient in weights_of(model).items() if gradient is not None}
    model.zero_grad()
    for x, _ in halves:
        model(x.detach().requires_grad_()).sum().backward()
    for name, gradient in weights_of(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


def test_failing_backward_says_what_failed() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no gradient today")

    x = an_input(2, 3)
    with pytest.raises(RuntimeError, match="backward for the inputs failed") as caught:
        stage_backward_input([Broken.apply(x)], None, [x], iter(()))
    assert "no gradient today" in str(caught.value.__cause__)
