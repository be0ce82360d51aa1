"""Stages of a model whose layers stand in a row: the unsplit model's outputs, gradients and names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pp_runtime
from pp_runtime import layer_modules, layer_stages, partition, stages_of_rank
from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.rehearsal import find_layers
from tests.helpers import api, ranks
from tests.helpers.layered_huggingface import LAYERS, MODELS, REFUSED, inputs_of
from tests.helpers.pipelines import EVERY_SCHEDULE, make_schedule

pytestmark = api.ours_only("cuts only what it traced")
WARM = "transformers.models.llama.modeling_llama transformers.models.gpt2.modeling_gpt2"


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def run_stages(stages: Sequence[nn.Module], *inputs: Any) -> Any:
    value = stages[0](*inputs)
    for stage in stages[1:]:
        value = stage(value)
    return value


def assert_equal_to_the_model(model: nn.Module, stages: Sequence[nn.Module], *inputs: Any) -> None:
    """The stages share the model's parameters."""
    plain = copy.deepcopy(model)
    expected, got = plain(*inputs), run_stages(stages, *inputs)
    assert type(got) is type(expected)
    for one, other in zip(tensors_of(got), tensors_of(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for value in (expected, got):
        sum(tensor.pow(2).sum() for tensor in tensors_of(value)).backward()  # type: ignore[union-attr]
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("sizes", [[2, 2, 1], [1, 4], [5, 0], [1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_stages_of_hugging_face_models_equal_the_model(name: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    made = layer_modules(model, sizes, range(len(sizes)), (inputs_of(name, 1),))
    stages = [module for module, _ in made.values()]
    assert_equal_to_the_model(model, stages, inputs_of(name, 3))
    whole = dict(model.named_parameters(remove_duplicate=False))
    held = [dict(stage.named_parameters()) for stage in stages]
    assert all(whole[key] is parameter for each in held for key, parameter in each.items())
    assert {parameter for each in held for parameter in each.values()} == set(model.parameters())
    container = f"{find_layers(model)[0]}."
    layers = [{key.removeprefix(container).split(".")[0] for key in each if key.startswith(container)} for each in held]
    assert [len(each) for each in layers] == sizes


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_computed_outside_of_modules_after_the_last_layer_is_refused(name: str) -> None:
    with pytest.raises(PipelineUsageError, match=r"after the last layer outside of a module, .* pipeline\(\)"):
        layer_modules(REFUSED[name]().eval(), [3, 2], [0], (inputs_of(name, 1),))


class Tailed(nn.Module):
    """Something after its layers, or between them."""

    def __init__(self, tail: Callable[[Any, Tensor], Any], between: Callable[[Tensor], Any] = lambda x: None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.leave = nn.Linear(4, 4)
        self.cap, self.drop = 30.0, nn.Dropout(0.5)
        self.tail, self.between = tail, between

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
            self.between(x)
        return self.tail(self, self.leave(x))


@pytest.mark.parametrize(
    "tail",
    [
        lambda model, x: model.cap * torch.tanh(x / model.cap),
        lambda model, x: (x[:, 0], x[:, -1], x[..., None], x[:, :, 0:]),
        lambda model, x: {"mean": x.mean(dim=1), "shares": torch.softmax(x.float(), -1), "other": x.transpose(1, 2)},
        lambda model, x: nn.functional.gelu(x).flatten(1) + model.cap,
        lambda model, x: model.drop(x.tanh()).neg(),
    ],
)
def test_functions_after_the_last_layer_are_called_again(tail: Callable[[Any, Tensor], Any]) -> None:
    for sizes in ([1, 2], [3, 0]):
        torch.manual_seed(0)
        model = Tailed(tail).eval()
        made = layer_modules(model, sizes, range(2), (torch.randn(2, 5, 4),))
        # Of other sizes than the example, so that a number that was one of them would be seen.
        assert_equal_to_the_model(model, [module for module, _ in made.values()], torch.randn(3, 7, 4))


@pytest.mark.parametrize(
    "tail",
    [
        lambda model, x: x / x.shape[1],
        lambda model, x: x * (1.0 / x.shape[1]),
        lambda model, x: x[:, x.shape[1] - 1],
        lambda model, x: x[:, 1:],
        lambda model, x: x.view(x.shape[0], -1),
        lambda model, x: x[torch.arange(len(x)), 0],
        lambda model, x: x @ model.leave.weight,
        lambda model, x: x * torch.ones(4),
        lambda model, x: nn.functional.dropout(x, 0.5),
        lambda model, x: x.to(torch.float64),
    ],
)
def test_functions_that_may_be_of_this_batch_alone_are_refused(tail: Callable[[Any, Tensor], Any]) -> None:
    with pytest.raises(PipelineUsageError, match="not in a way that is sure to mean the same for other batches"):
        layer_modules(Tailed(tail), [1, 2], [0], (torch.randn(2, 5, 4),))


@pytest.mark.parametrize("where", ["between", "after", "of the result"])
def test_changes_in_place_outside_of_modules_are_refused(where: str) -> None:
    def tail(model: Tailed, x: Tensor) -> Any:
        return x.mul_(2.0) if where == "of the result" else x

    change = {"between": lambda x: x.add_(1), "after": lambda x: x.mul_(2) if x.mean() > 1e9 else x}
    model = Tailed(tail, change.get(where, lambda x: None))
    if where == "after":
        model.leave.register_forward_pre_hook(lambda module, args: None)
        model.between = lambda x: None
        model.tail = lambda model, x: (x.relu_(), x)[1]
    with pytest.raises(PipelineUsageError, match="changes a tensor in place"):
        layer_modules(model, [1, 2], [0], (torch.randn(2, 5, 4),))


def test_hooks_around_the_layers_are_refused_and_others_run() -> None:
    seen: list[str] = []
    model = Model()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    model.enter.register_forward_hook(lambda module, args, output: output + 1)
    model.blocks["block_2"].register_forward_hook(lambda module, args, output: output * 3)
    model.leave.register_full_backward_hook(lambda module, inputs, outputs: seen.append("leave"))
    made = layer_modules(model, [1, 2, 1], range(3), (torch.randn(2, 4), 2.0))
    assert_equal_to_the_model(model, [module for module, _ in made.values()], torch.randn(5, 4), 2.0)
    assert seen == ["leave", "leave"]
    for register, kind in (
        (model.register_forward_hook, "the model has a hook .forward hook."),
        (model.blocks.register_forward_hook, "blocks has a hook .forward hook."),
        (model.register_full_backward_hook, "the model has a hook .backward hook."),
        (model.register_full_backward_pre_hook, "the model has a hook .backward pre hook."),
    ):
        handle = register(lambda *_: None)
        with pytest.raises(PipelineUsageError, match=kind):
            layer_modules(model, [1, 2, 1], range(3), (torch.randn(2, 4), 0.5))
        handle.remove()


def test_buffers_of_the_model_are_given_to_layers_and_are_not_touched() -> None:
    class Masked(Tailed):
        def __init__(self) -> None:
            super().__init__(lambda model, x: model.leave(x))
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.register_buffer("mask", torch.ones(4))

        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                x = layer(self.mask, x)
            return self.leave(x)

    model = Masked()
    before = (model.mask * model.leave.weight).sum()  # its graph saved the mask
    made = layer_modules(model, [1, 2], range(2), (torch.randn(2, 4),))
    before.backward()
    model.zero_grad()
    assert_equal_to_the_model(model, [module for module, _ in made.values()], torch.randn(3, 4))


class Unlike(nn.Module):
    """Does what stages would do otherwise, in the way of its name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.enter, self.leave, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        x = first = self.enter(x)
        for number, layer in enumerate(self.layers):
            if self.way == "no gradients in layers" and number < 3:
                with torch.no_grad():
                    x = layer(x)
            elif self.way == "autocast in layers":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = layer(x).float()
            elif self.way == "autocast around layers":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = layer(x)
            else:
                x = layer(x)
            if self.way == "detached between layers":
                x = x.detach()
            if self.way == "looks at values" and x.mean() > 1e9:
                x = first
        if self.way == "no gradients after layers":
            with torch.no_grad():
                return self.leave(x)
        if self.way == "looks at the result":
            y = self.leave(x)
            return self.other(y) if y.sum().item() > 1e9 else y
        y = self.leave(x)
        return {"detached result": y.detach(), "number": {"y": y, "n": x.shape[0]}}.get(self.way, y)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("no gradients in layers", "records no gradients around layers.0, which its stages would not"),
        ("no gradients after layers", "records no gradients around leave"),
        ("autocast in layers", "changes autocast around layers.0"),
        ("autocast around layers", "changes autocast around layers.0"),
        ("detached between layers", "computes something between its layers"),
        ("detached result", "the model returns a value that is computed after the last layer"),
        ("looks at values", "looks at a value of the batch between the layers"),
        ("looks at the result", "looks at a value of the batch between the layers of layers or after them"),
        ("number", "returns the number 2, which may be of this batch alone"),
    ],
)
def test_what_stages_would_do_otherwise_is_refused(way: str, words: str) -> None:
    with torch.no_grad(), pytest.raises(PipelineUsageError, match=words):
        layer_modules(Unlike(way), [2, 2], [0], (torch.randn(2, 4),))


def test_autocast_and_frozen_parts_around_the_whole_model_are_none_of_that() -> None:
    model = Unlike("plain")
    model.enter.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    made = layer_modules(model, [2, 2], range(2), (torch.randn(2, 4),))
    assert_equal_to_the_model(model, [module for module, _ in made.values()], torch.randn(3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = layer_modules(model, [2, 2], range(2), (torch.randn(2, 4),))
        one, other = model(torch.ones(1, 4)), run_stages([module for module, _ in made.values()], torch.ones(1, 4))
    assert one.dtype == torch.bfloat16 and torch.equal(one, other)


class Extra(nn.Module):
    """Layers that give the next ones more than the hidden state."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(ExtraLayer(way) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        extra, first = x.new_zeros(()), None
        for layer in self.layers:
            found = layer(x, extra)
            x = found[0] if isinstance(found, tuple) else found
            first = x if first is None else first
            if self.way == "returned":
                extra = found[1] if len(found) > 1 else extra
            if self.way == "computed":
                extra = x.mean()
            if self.way == "skipped to":
                extra = first
        return x


class ExtraLayer(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(4, 4)

    def forward(self, x: Tensor, extra: Tensor) -> Any:
        x = self.linear(x) + extra
        return {"returned": (x, extra + 1), "constants": (x, None, False)}.get(self.way, x)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("returned", "layers.1 is given what its stage would not know"),
        ("computed", "layers.1 is given what its stage would not know"),
        ("skipped to", "layers.2 is given what its stage would not know"),
    ],
)
def test_what_layers_hand_on_beside_the_hidden_state_is_refused(way: str, words: str) -> None:
    with pytest.raises(PipelineUsageError, match=words):
        layer_modules(Extra(way), [2, 2], [0], (torch.randn(2, 4),))


def test_constants_beside_the_hidden_state_are_returned() -> None:
    model = Extra("constants")
    made = layer_modules(model, [1, 3], range(2), (torch.randn(2, 4),))
    assert_equal_to_the_model(model, [module for module, _ in made.values()], torch.randn(3, 4))


class ByMode(Unlike):
    def forward(self, x: Tensor) -> Any:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        if self.way == "fails in training" and self.training:
            return nn.functional.dropout(self.leave(x), 0.5)
        return self.leave(x) if self.training else self.other(x)


@pytest.mark.parametrize("training", [False, True])
def test_what_follows_the_layers_may_depend_on_the_mode(training: bool) -> None:
    model = ByMode("plain").train(training)
    model.layers[1].training = not training
    made = layer_modules(model, [2, 2], range(2), (torch.randn(2, 4),))
    assert model.training is training and model.layers[1].training is not training and model.leave.training is training
    stages = [module for module, _ in made.values()]
    for mode in (True, False):
        for module in (model, *stages):
            module.train(mode)
        model.zero_grad()
        x = torch.randn(3, 4)
        assert torch.equal(model(x), run_stages(stages, x))


def test_a_mode_in_which_the_model_cannot_be_cut_is_refused_when_it_is_used() -> None:
    made = layer_modules(ByMode("fails in training").eval(), [2, 2], range(2), (torch.randn(2, 4),))
    stages = [module.eval() for module, _ in made.values()]
    run_stages(stages, torch.randn(2, 4))
    for stage in stages:
        stage.train()
    with pytest.raises(PipelineUsageError, match="not made for training, where their model's example failed"):
        run_stages(stages, torch.randn(2, 4))


def test_modules_that_work_in_place_are_none_of_that() -> None:
    model = Tailed(lambda model, x: model.last(x))
    model.last = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
    made = layer_modules(model, [1, 2], range(2), (torch.randn(2, 5, 4),))
    assert_equal_to_the_model(model, [module for module, _ in made.values()], torch.randn(2, 5, 4))


def test_the_model_is_left_as_it_was() -> None:
    model = Tailed(lambda model, x: model.drop(model.norm(x.flatten(1))))
    model.norm = nn.BatchNorm1d(20)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    layer_modules(model, [1, 2], [0], (torch.randn(2, 5, 4, generator=torch.Generator()),))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Layer(nn.Module):
    kind = "plain"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, bias: Tensor, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return torch.tanh(self.linear(x)) * scale + bias


class Model(nn.Module):
    """Layers in a dict; what they are given beside the hidden state is trained, too, and is in front of it."""

    def __init__(self, between: bool = False, layers: int = 4) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 4))
        self.enter = nn.Linear(4, 4)
        self.blocks = nn.ModuleDict({f"block_{number}": Layer() for number in range(layers)})
        self.leave = nn.Linear(4, 2)
        self.between = between

    def forward(self, x: Tensor, scale: float = 1.0, extra: Tensor | None = None) -> dict[str, Any]:
        x = self.enter(x)
        for number, layer in enumerate(self.blocks.values()):
            assert layer.kind == "plain"
            x = layer(self.bias[number % 2], x, scale=scale)
            x = x + 1 if self.between else x
        return {"logits": self.leave(x), "hidden": x, "kind": "plain"}


def test_any_model_with_trained_inputs_of_its_layers() -> None:
    torch.manual_seed(0)
    model = Model()
    stages = [module for module, _ in layer_modules(model, [1, 2, 1], range(3), (torch.randn(2, 4), 2.0)).values()]
    assert_equal_to_the_model(model, stages, torch.randn(5, 4), 2.0)
    assert [name for name, _ in stages[1].named_parameters()] == [
        f"blocks.block_{number}.linear.{kind}" for number in (1, 2) for kind in ("weight", "bias")
    ]
    assert not hasattr(stages[1], "bias") and stages[1].enter is None
    assert copy.deepcopy(stages[2])(stages[1](stages[0](torch.randn(5, 4), 2.0)))["kind"] == "plain"


def test_a_model_on_the_meta_device_is_cut_before_it_has_weights() -> None:
    torch.manual_seed(0)
    full = Model()
    with torch.device("meta"):
        model = Model()
    made = layer_modules(model, [2, 2], [0, 1], (torch.empty(2, 4, device="meta"),))
    for module, _ in made.values():
        module.to_empty(device="cpu")
        module.load_state_dict({name: full.state_dict()[name] for name in module.state_dict()})
    x = torch.randn(3, 4)
    got = run_stages([module for module, _ in made.values()], x)
    torch.testing.assert_close(got["logits"], full(x)["logits"], rtol=0, atol=0)
    with pytest.raises(PipelineUsageError, match="on the meta device.*give weights="):
        layer_stages(model, [2, 2], [0], "cpu", (torch.empty(2, 4, device="meta"),))


def test_what_any_two_stages_share_is_tied_on_every_one_of_them() -> None:
    model = Model()
    shared = model.blocks["block_1"].linear
    model.blocks["block_2"].linear.weight = shared.weight
    for stages in ([1], [2], [1, 2], [0, 3]):
        made = layer_modules(model, [1, 1, 1, 1], stages, (torch.randn(2, 4),))
        ties = {index: names for index, (_, names) in made.items()}
        names = {1: ["blocks.block_1.linear.weight"], 2: ["blocks.block_2.linear.weight"]}
        assert ties == {index: names.get(index, []) for index in stages}


def test_other_inputs_than_those_of_the_example_are_refused() -> None:
    model = Model()
    first, _ = layer_modules(model, [2, 2], [0], (torch.randn(2, 4),))[0]
    with pytest.raises(
        PipelineUsageError, match="is given a tensor, and it is given a tensor, extra=a tensor: what it"
    ):
        first(torch.randn(2, 4), extra=torch.ones(1))
    # A switch or a number may decide what happens on stages that are not given it.
    made = layer_modules(model, [2, 2], range(2), (torch.randn(2, 4),), {"scale": 2.0})
    first, second = (module for module, _ in made.values())
    assert second(first(torch.randn(3, 4), scale=2.0, extra=None))["kind"] == "plain"
    with pytest.raises(PipelineUsageError, match="is given a tensor, scale=2.0, and it is given a tensor, scale=3.0"):
        first(torch.randn(2, 4), scale=3.0)


def test_a_model_that_leaves_layers_out_is_told_so() -> None:
    class Dropping(Model):
        drops: tuple[int, ...] = ()

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            x = self.enter(x)
            for number, layer in enumerate(self.blocks.values()):
                x = x if number in self.drops else layer(self.bias[0], x)
            return self.leave(x)

    for dropped in (2, 3):
        first, _ = layer_modules(Dropping(), [2, 2], [0], (torch.randn(2, 4),))[0]
        first.drops = (dropped,)  # type: ignore[assignment]
        with pytest.raises(PipelineUsageError, match="did not call each of its layers once"):
            first(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("model", "sizes", "options", "words"),
    [
        (Model(between=True), [2, 2], {}, "computes something between its layers"),
        (Model(), [2, 3], {}, "those of 5 layers, and blocks has 4"),
        (Model(), [0, 4], {}, "the first stage needs a layer"),
        (Model(), [2, 2], {"layers": "enter"}, "'enter' is a Linear, not a list or dict of layers"),
        (Model(), [2, 2], {"layers": "layers"}, "the model has no module 'layers'"),
        (nn.Linear(4, 4), [1, 1], {}, "no layers found"),
    ],
)
def test_what_cannot_be_cut_is_said(model: nn.Module, sizes: list[int], options: dict[str, Any], words: str) -> None:
    with pytest.raises(PipelineUsageError, match=words):
        layer_modules(model, sizes, [0], (torch.randn(2, 4),), **options)


def test_a_cache_is_refused_with_the_mend() -> None:
    model = MODELS["Llama"]().eval()
    model.config.use_cache = True  # type: ignore[union-attr]
    with pytest.raises(PipelineUsageError, match="is given a DynamicCache.*config.use_cache = False"):
        layer_modules(model, [3, 2], [0], (inputs_of("Llama", 1),))


def _loss(output: Any, target: Tensor) -> Tensor:
    """Of every tensor that a model returns, whatever it is."""
    return torch.stack([(tensor - target.mean()).pow(2).mean() for tensor in tensors_of(output)]).sum()


def _train_in_every_schedule(rank: int, name: str) -> list[str]:
    return [found for schedule in EVERY_SCHEDULE for found in _train(rank, name, schedule)]


def _train(rank: int, name: str, schedule: str) -> list[str]:
    """Two steps; what of the stages' parameters differs from the plain model's after them."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    plain = copy.deepcopy(model)
    mine = stages_of_rank(schedule, rank, 2)
    sizes = partition([1.0] * LAYERS, 2 * len(mine))
    stages = layer_stages(model, sizes, mine, "cpu", (inputs_of(name, 1),))
    made = make_schedule(schedule, stages, 4, _loss)
    parts = nn.ModuleList([stage.submod for stage in stages])
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (plain, parts)]
    first, last = any(stage.is_first for stage in stages), any(stage.is_last for stage in stages)
    for number in range(2):
        given = inputs_of(name, 8 + 8 * number)[:8]
        target = torch.randn(8, 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part, wanted in zip(given.chunk(4), target.chunk(4), strict=True):
            (_loss(plain(part), wanted) / 4).backward()
        losses: list[Tensor] = []
        made.step(*((given,) if first else ()), **({"target": target, "losses": losses} if last else {}))
        for optimizer in optimizers:
            optimizer.step()
    trained = dict(plain.named_parameters(remove_duplicate=False))
    return [
        f"{name}, {schedule}: {key}"
        for stage in stages
        for key, parameter in stage.submod.named_parameters()
        if not torch.allclose(parameter, trained[key], rtol=1e-5, atol=1e-6)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_unsplit_model_in_every_schedule(name: str) -> None:
    assert ranks.run(_train_in_every_schedule, 2, timeout=120, name=name) == [[], []]


def test_names_are_importable_from_the_package() -> None:
    assert dist.is_available()
    assert {"layer_modules", "layer_stages", "layer_costs", "partition"} <= set(pp_runtime.__all__)
