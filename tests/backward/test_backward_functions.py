"""The public functions take and give what torch.distributed.pipelining's do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import _backward as torch_backward

from pp_runtime import _backward as our_backward
from pp_runtime._backward import stage_backward, stage_backward_input, stage_backward_weight
from pp_runtime.errors import PipelineUsageError


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def an_input() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)


def grads(module: nn.Module) -> list[torch.Tensor | None]:
    found = [weight.grad for weight in module.parameters()]
    module.zero_grad()
    return found


def same(left: Any, right: Any) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", ["stage_backward", "stage_backward_input", "stage_backward_weight"])
def test_parameters_are_torchs(name: str) -> None:
    ours, torchs = (inspect.signature(getattr(module, name)) for module in (our_backward, torch_backward))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in torchs.parameters.values()
    ]


@pytest.mark.parametrize("as_loss", [False, True])
def test_whole_backward_is_torchs(as_loss: bool) -> None:
    results = []
    for function in (stage_backward, torch_backward.stage_backward):
        stage, x = Stage(), an_input()
        output = stage(x)
        if as_loss:
            found = function(output.sum(), None, [x, 3])
        else:
            found = function((output,), (torch.full_like(output, 2.0),), [x, 3])
        assert x.grad is None
        results.append((found, grads(stage)))
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])


def test_nested_outputs_and_chosen_ones() -> None:
    results = []
    for function in (stage_backward, torch_backward.stage_backward):
        stage, x = Stage(), an_input()
        y = stage(x)
        output = {"a": [y, y * 2], "b": (y * 3, "text"), "c": y.detach()}
        gradient = {"a": [torch.ones_like(y), torch.ones_like(y)], "b": (torch.ones_like(y), None), "c": None}
        first = function(output, gradient, [x])
        second_x = an_input()
        outputs = [stage(second_x), stage(second_x) * 2]
        second = function(outputs, [None, torch.ones_like(y)], [second_x], [1])
        results.append((first + second, grads(stage)))
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])


@pytest.mark.parametrize("output_grads", [None, 2.0])
def test_halves_are_torchs(output_grads: float | None) -> None:
    results = []
    for module in (our_backward, torch_backward):
        stage, x = Stage(), an_input()
        output = stage(x)
        gradient = None if output_grads is None else [torch.full_like(output, output_grads)]
        found, groups = module.stage_backward_input([output], gradient, [x, 3, None], stage.parameters())
        assert isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
        assert grads(stage) == [None] * 4
        assert torch.equal(x.grad, found[0])
        module.stage_backward_weight(stage.parameters(), groups)
        results.append((found, grads(stage)))
    same(results[0][0], results[1][0])
    same(results[0][1], results[1][1])


def test_input_gradients_are_added_to_what_is_there() -> None:
    stage, x = Stage(), an_input()
    for _ in range(2):
        (found,), _ = stage_backward_input([stage(x)], None, [x], stage.parameters())
    torch.testing.assert_close(x.grad, 2 * found)


def test_inputs_that_are_not_leaves() -> None:
    stage, leaf = Stage(), torch.randn(2, 3, 4, requires_grad=True)
    x, y = (leaf * 2).unbind()
    output = stage(x) * y
    (for_x, for_y), groups = stage_backward_input([output], None, [x, y], stage.parameters())
    assert leaf.grad is None
    expected = torch.autograd.grad(stage(x) * y, [x, y], torch.ones_like(output))
    same((for_x, for_y), expected)
    stage_backward_weight(stage.parameters(), groups)


def test_weight_backward_returns_each_weights_gradient() -> None:
    stage, x = Stage(), an_input()
    _, groups = stage_backward_input([stage(x)], None, [x], stage.parameters())
    found = stage_backward_weight(stage.parameters(), groups)
    assert all(a is b.grad for a, b in zip(found, stage.parameters(), strict=True))


def test_loss_of_a_last_stage() -> None:
    stage, x = Stage(), an_input()
    loss = stage(x).square().mean()
    (found,), groups = stage_backward_input([loss], None, [x], stage.parameters())
    stage_backward_weight(stage.parameters(), groups)
    halves = grads(stage)
    twin = an_input()
    stage(twin).square().mean().backward()
    same((found, *halves), (twin.grad, *grads(stage)))


def test_wrong_gradients_are_refused_in_words() -> None:
    stage, x = Stage(), an_input()
    y = stage(x)
    with pytest.raises(PipelineUsageError, match="2 outputs need as many gradients"):
        stage_backward([y, y], [y], [x])
    with pytest.raises(PipelineUsageError, match="same keys"):
        stage_backward({"a": y}, {"b": y}, [x])
    with pytest.raises(PipelineUsageError, match="tensor or None, not int"):
        stage_backward(y, 3, [x])
    with pytest.raises(PipelineUsageError, match="weight_half"):
        stage_backward_weight(stage.parameters(), [{"params": set()}])
    with pytest.raises(RuntimeError, match=r"Outputs: \(Tensor\(\(3, 4\)"):
        stage_backward_input([y], [torch.ones(7, 7)], [x], stage.parameters())


class Shared(nn.Module):
    """Two layers of which one is used twice, a scale that does not meet the input, and a bias that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(4))
        self.one.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(torch.relu(self.two(self.one(x)))) + 2 * self.scale


@pytest.mark.parametrize("kind", [Stage, Shared])
def test_the_graph_of_gradients_is_read_as_torch_reads_it(kind: type[nn.Module]) -> None:
    stage, x = kind(), an_input()
    output = stage(x)
    found = []
    for module in (our_backward, torch_backward):
        node_of = module._get_grad_fn_or_grad_acc
        roots, inputs = [node_of(output)], [node_of(x)]
        weights = [node_of(weight) for weight in stage.parameters() if weight.requires_grad]
        users = module.construct_reverse_graph(roots)
        closure = module.reverse_closure(inputs, set(roots), users)
        groups = module.get_param_groups(inputs, weights, users)
        sets = {(frozenset(group["params"]), frozenset(group["intermediates"])) for group in groups}
        found.append((roots, inputs, weights, {key: set(of) for key, of in users.items() if of}, closure, sets))
    assert found[0] == found[1] and found[0][3] and len(found[0][5]) >= 2


def test_the_gradient_node_of_a_leaf_is_its_accumulator_also_under_no_grad() -> None:
    x = an_input()
    with torch.no_grad():
        node = our_backward._get_grad_fn_or_grad_acc(x)
    assert node is not None and node.variable is x
    assert our_backward._get_grad_fn_or_grad_acc(2 * x).name() == "MulBackward0"
    assert our_backward._get_grad_fn_or_grad_acc(torch.ones(1)) is None


def test_parameters_that_share_where_they_meet_the_inputs_side_are_one_group() -> None:
    x, weight, bias, other = (torch.ones(2, requires_grad=True) for _ in range(4))
    joined = (x * (weight + bias)) * other
    node_of = our_backward._get_grad_fn_or_grad_acc
    users = our_backward.construct_reverse_graph([node_of(joined)])
    groups = our_backward.get_param_groups([node_of(x)], [node_of(t) for t in (weight, bias, other)], users)
    assert [group["params"] for group in groups] == [{node_of(weight), node_of(bias)}, {node_of(other)}]
    assert [{node.name() for node in group["intermediates"]} for group in groups] == [{"MulBackward0"}] * 2
