"""The state of an optimizer under names: another optimizer that is given it goes on as if it were the first one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from pp_runtime.errors import PipelineUsageError
from pp_runtime.running import load_optimizer_state, optimizer_state
from tests.helpers import api

pytestmark = api.ours_only("saves no optimizer")

Make = Callable[[Any], Optimizer]
KINDS: dict[str, Make] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.1, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.1, amsgrad=True),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, 0.1, fused=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, 0.1, momentum=0.5, centered=True),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, 0.1),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, 0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, 0.1),
    "a rate that is a tensor": lambda parameters: torch.optim.AdamW(parameters, torch.tensor(0.1), foreach=False),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2)
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def groups_of(model: Model) -> Any:
    rest = [*model.second.parameters(), *model.unused.parameters()]
    return [{"params": list(model.first.parameters()), "weight_decay": 0.0}, {"params": rest, "lr": 0.02}]


def train(model: nn.Module, optimizer: Optimizer, steps: Iterator[int] | range) -> None:
    for step in steps:
        model(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def made(kind: str, seed: int = 0, model: Model | None = None) -> tuple[Model, Optimizer]:
    torch.manual_seed(seed)
    model = Model() if model is None else model
    return model, KINDS[kind](groups_of(model) if "tensor" not in kind else model.parameters())


def assert_same_training(model: nn.Module, optimizer: Optimizer, other: nn.Module, another: Optimizer) -> None:
    for each in ((model, optimizer), (other, another)):
        train(*each, range(10, 13))
    for (name, one), value in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, value), name


@pytest.mark.parametrize("kind", KINDS)
@given(before=st.integers(0, 3), since=st.integers(0, 2))
@settings(deadline=None, max_examples=8)
def test_training_goes_on_bit_for_bit(kind: str, before: int, since: int) -> None:
    """Of an optimizer that made some steps, into one that did not or made others."""
    model, optimizer = made(kind)
    train(model, optimizer, range(before))
    state = copy.deepcopy(optimizer_state(optimizer, names_of(model)))
    other, another = made(kind, seed=1)
    train(other, another, range(20, 20 + since))
    other.load_state_dict(model.state_dict())
    load_optimizer_state(another, names_of(other), state)
    assert_same_training(model, optimizer, other, another)


@pytest.mark.parametrize("kind", KINDS)
def test_asking_for_the_state_changes_neither_optimizer_nor_parameters(kind: str) -> None:
    (model, optimizer), (other, another) = made(kind), made(kind)
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda *call: calls.append(call))
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    optimizer_state(optimizer, names_of(model))
    assert not calls and str(optimizer.state_dict()["state"]) == str(another.state_dict()["state"])
    assert_same_training(model, optimizer, other, another)


def test_keys_do_not_depend_on_whether_a_step_was_made() -> None:
    model, optimizer = made("AdamW")
    before = optimizer_state(optimizer, names_of(model))
    train(model, optimizer, range(1))
    after = optimizer_state(optimizer, names_of(model))
    assert before.keys() == after.keys()
    assert (before["has_state.first.weight"], after["has_state.first.weight"]) == (0, 1)
    assert after["has_state.unused.weight"] == after["has_state.first.bias"] == 0
    assert "state.first.bias.exp_avg" not in after and "state.unused.weight.max_exp_avg_sq" in after
    assert after["param_groups.first.weight.weight_decay"] == 0.0 and after["param_groups.second.weight.lr"] == 0.02
    assert after["state.first.weight.exp_avg"] is optimizer.state[model.first.weight]["exp_avg"]


def test_states_that_torch_flattened_are_read() -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model, optimizer = made("Adam", model=Model().requires_grad_(True))
    train(nn.Sequential(model, model.unused), optimizer, range(2))
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    other, another = made("Adam", model=copy.deepcopy(model))
    load_optimizer_state(another, names_of(other), flat)
    assert_same_training(model, optimizer, other, another)


def test_other_parts_of_the_model_may_be_in_it_and_tensors_are_copied() -> None:
    model, optimizer = made("Adam")
    train(model, optimizer, range(2))
    state = optimizer_state(optimizer, names_of(model))
    part = torch.optim.Adam(model.first.parameters())
    load_optimizer_state(part, names_of(model), state)
    assert part.param_groups[0]["weight_decay"] == 0.0 and len(part.state) == 1
    mine, its = (each.state[model.first.weight]["exp_avg"] for each in (part, optimizer))
    assert torch.equal(mine, its) and mine.data_ptr() != its.data_ptr()


class Nested(Optimizer):
    """Keeps a dict of what it keeps, as Shampoo does, in another dtype than the parameter's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    kept = self.state[each].setdefault("kept", {0: torch.zeros_like(each, dtype=torch.double), "n": 0})
                    kept[0] += each.grad
                    kept["n"] += 1
                    each -= group["lr"] * kept[0] / kept["n"]


def test_nested_states_and_their_dtypes_are_kept() -> None:
    torch.manual_seed(0)
    model, other = Model(), Model()
    optimizer, another = Nested(model.parameters()), Nested(other.parameters())
    train(model, optimizer, range(2))
    state = optimizer_state(optimizer, names_of(model))
    assert state["state.second.bias.kept.n"] == 2
    other.load_state_dict(model.state_dict())
    load_optimizer_state(another, names_of(other), state)
    assert another.state[other.second.bias]["kept"][0].dtype == torch.double
    assert_same_training(model, optimizer, other, another)


def refusal(state: dict[str, Any], kind: str = "Adam", change: Callable[[Model], Any] = lambda _: None) -> str:
    """What is said of a state, by an optimizer that is then as it was."""
    model, optimizer = made(kind)
    change(model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(PipelineUsageError) as error:
        load_optimizer_state(optimizer, names_of(model), state)
    assert str(optimizer.state_dict()) == str(before)
    return str(error.value)


def test_states_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    model, optimizer = made("Adam")
    train(model, optimizer, range(1))
    state = optimizer_state(optimizer, names_of(model))

    def but(**changes: Any) -> dict[str, Any]:
        return state | {name.replace("__", "."): value for name, value in changes.items()}

    less = {key: value for key, value in state.items() if "second.bias" not in key}
    assert "lacks second.bias, which the optimizer holds" in refusal(less)
    assert "is that of torch.optim.adam.Adam, and the optimizer is torch.optim.sgd.SGD" in refusal(state, "SGD")
    unnamed = {key: value for key, value in state.items() if key != "optimizer"}
    assert "lacks the option dampening of first.weight: it is of another optimizer" in refusal(unnamed, "SGD")
    other_lr = but(param_groups__second__bias__lr=0.5)
    assert "second.weight and second.bias are in one group .* lr is 0.02 and 0.5".replace(".*", "of the optimizer, and "
        "the state has other options for them:") in refusal(other_lr)  # fmt: skip
    amsgrad = {key: True if key.endswith("amsgrad") else value for key, value in state.items()}
    assert "keeps exp_avg, exp_avg_sq, max_exp_avg_sq, step: make it of the class" in refusal(amsgrad)
    assert "the shape of exp_avg of second.bias is torch.Size([3]) in the" in refusal(
        but(state__second__bias__exp_avg=torch.ones(3))
    )
    assert "the dtype of exp_avg of second.bias is torch.float64 in the" in refusal(
        but(state__second__bias__exp_avg=torch.ones(2).double())
    )
    assert "step of second.bias is a int in the state, and the optimizer keeps a Tensor" in refusal(
        but(state__second__bias__step=1)
    )


def test_optimizers_whose_state_cannot_be_named_are_refused() -> None:
    model, optimizer = made("Adam")
    with pytest.raises(PipelineUsageError, match=r"parameter 0 of the optimizer, of shape \(4, 4\), is none of"):
        optimizer_state(optimizer, names_of(Model()))
    with pytest.raises(PipelineUsageError, match="parameter 0 of the optimizer"):
        load_optimizer_state(optimizer, names_of(Model()), optimizer_state(optimizer, names_of(model)))
    with pytest.raises(PipelineUsageError, match="a LBFGS does not say what it keeps of a parameter"):
        optimizer_state(torch.optim.LBFGS([model.first.weight]), names_of(model))
    optimizer.state[model.first.weight] = {"history": [1]}
    with pytest.raises(PipelineUsageError, match="state.first.weight.history is a list"):
        optimizer_state(optimizer, names_of(model))
    with pytest.raises(PipelineUsageError, match="same is tied, and its copies are in groups .* with other lr"):
        optimizer_state(made("Adam", model=model)[1], dict.fromkeys(model.parameters(), "same"))
