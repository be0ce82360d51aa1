"""Hooks fire once a microbatch, in the half that makes their gradient, and see what a whole backward shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks

from pp_runtime._backward import stage_backward_input, stage_backward_weight
from tests.helpers.backward_halves import Gradients, assert_same, assert_split_is_whole, split, whole


class Hooked(nn.Module):
    """Two layers; `observe(name, tensor)` meets every tensor on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.observe: Callable[[str, torch.Tensor], None] = lambda name, tensor: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("first", "norm", "second"):
            x = getattr(self, name)(x)
            self.observe(name, x)
        scaled = self.second.weight * 2
        self.observe("scaled", scaled)
        return x @ scaled


def an_input() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


def both(model: nn.Module) -> tuple[Gradients, Gradients]:
    inputs = [an_input()]
    return whole(model, inputs), split(model, inputs)


def test_tensor_hooks_change_the_gradient_once() -> None:
    model = Hooked()
    seen: Counter[str] = Counter()

    def observe(name: str, tensor: torch.Tensor) -> None:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            seen[name] += 1
            return gradient * 3

        tensor.register_hook(hook)

    plain = whole(model, [an_input()])
    model.observe = observe
    hooked, halves = both(model)
    assert_same(hooked, halves)
    assert set(seen.values()) == {2}
    assert not torch.equal(plain.inputs[0], halves.inputs[0])


def test_hooks_before_a_node_change_what_it_gets_once() -> None:
    model = Hooked()
    seen: Counter[str] = Counter()

    def observe(name: str, tensor: torch.Tensor) -> None:
        def hook(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            seen[name] += 1
            return (gradients[0] * 3, *gradients[1:])

        tensor.grad_fn.register_prehook(hook)

    model.observe = observe
    assert_same(*both(model))
    assert set(seen.values()) == {2}


def test_hooks_after_a_node_see_all_its_gradients() -> None:
    model = Hooked()
    seen: list[tuple[str, list[Any]]] = []

    def observe(name: str, tensor: torch.Tensor) -> None:
        def hook(made: tuple[Any, ...], got: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append((name, [None if part is None else tuple(part.shape) for part in made]))
            return tuple(None if part is None else part * 3 for part in made)

        tensor.grad_fn.register_hook(hook)

    model.observe = observe
    assert_same(*both(model))
    assert len(seen) == 8
    assert sorted(seen[:4]) == sorted(seen[4:])


def test_retained_gradients_inside_the_graph() -> None:
    model = Hooked()
    kept: list[torch.Tensor] = []

    def observe(name: str, tensor: torch.Tensor) -> None:
        tensor.retain_grad()
        kept.append(tensor)

    model.observe = observe
    both(model)
    for left, right in zip(kept[:4], kept[4:], strict=True):
        assert torch.equal(left.grad, right.grad)


def test_one_hook_over_several_tensors_fires_when_all_have_their_gradient() -> None:
    model = Hooked()
    found: list[torch.Tensor] = []
    calls: list[list[bool]] = []

    def observe(name: str, tensor: torch.Tensor) -> None:
        found.append(tensor)
        if name == "second":
            register_multi_grad_hook(found[-3:], lambda gradients: calls.append([g is not None for g in gradients]))

    model.observe = observe
    both(model)
    assert calls == [[True] * 3] * 2


def test_weight_hooks_fire_in_the_weight_half() -> None:
    model = Hooked()
    seen: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        weight.register_hook(lambda gradient, name=name: seen.update([name + " tensor"]))
        weight.register_post_accumulate_grad_hook(lambda weight, name=name: seen.update([name + " accumulated"]))
    x = an_input()
    groups = stage_backward_input([model(x)], None, [x], model.parameters())[1]
    assert not seen
    stage_backward_weight(model.parameters(), groups)
    assert len(seen) == 12 and set(seen.values()) == {1}


def test_input_hooks_fire_in_the_input_half() -> None:
    model = Hooked()
    x = an_input()
    x.register_hook(lambda gradient: gradient * 5)
    (found,), _ = stage_backward_input([model(x)], None, [x], model.parameters())
    torch.testing.assert_close(found, whole(model, [an_input()]).inputs[0] * 5)


def test_module_backward_hooks_see_the_module_gradients() -> None:
    model = Hooked()
    seen: list[tuple[Any, ...]] = []

    def hook(module: nn.Module, made: tuple[Any, ...], got: tuple[Any, ...]) -> None:
        seen.append((type(module).__name__, made[0].clone(), got[0].clone()))

    for module in (model.first, model.norm, model.second):
        module.register_full_backward_hook(hook)
    assert_same(*both(model))
    assert len(seen) == 6
    for left, right in zip(seen[:3], seen[3:], strict=True):
        assert left[0] == right[0]
        assert torch.equal(left[1], right[1]) and torch.equal(left[2], right[2])


@pytest.mark.parametrize("again", [False, True])
def test_saved_tensor_hooks_unpack_each_tensor_once(again: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    unpacked: Counter[int] = Counter()
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    def unpack(index: int) -> torch.Tensor:
        unpacked[index] += 1
        return packed[index]

    hooks = saved_tensors_hooks(pack, unpack)
    x = an_input()
    with hooks:
        output = model(x)
        count = len(packed)
        if not again:
            # The backward itself may stand inside the context: what is saved then must not be packed again.
            groups = stage_backward_input([output], None, [x], model.parameters())[1]
    if again:
        groups = stage_backward_input([output], None, [x], model.parameters())[1]
    stage_backward_weight(model.parameters(), groups)
    assert len(packed) == count
    assert set(unpacked.values()) == {1}


def test_tensors_saved_elsewhere() -> None:
    class Offloaded(Hooked):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with save_on_cpu():
                return super().forward(x)

    assert_split_is_whole(Offloaded(), an_input())
