"""Weights that are read for one rank's stages: the whole model's, no more than are needed, never others silently."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pp_runtime import layer_modules, load_weights, open_weights, without_weights
from pp_runtime.errors import PipelineUsageError
from tests.helpers import api
from tests.helpers.checkpoints import FORMS, Noted, write, write_safetensors, write_shards, write_torch
from tests.helpers.layered_huggingface import LAYERS, MODELS, inputs_of

pytestmark = api.ours_only("reads no weights")


def without_values(name: str) -> nn.Module:
    with without_weights():
        return MODELS[name]().eval()


def full(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def stages_without_values(name: str, sizes: list[int]) -> tuple[nn.Module, list[nn.Module]]:
    model = without_values(name)
    made = layer_modules(model, sizes, range(len(sizes)), (inputs_of(name, 1),))
    return model, [module for module, _ in made.values()]


@pytest.mark.parametrize("name", MODELS)
def test_stages_of_a_model_without_values_are_the_model_once_they_are_filled(name: str) -> None:
    whole = full(name)
    model, stages = stages_without_values(name, [2, 2, 1])
    load_weights(stages, whole.state_dict(), model=model)
    value: Any = inputs_of(name, 3)
    for stage in stages:
        value = stage(value)
    expected = whole(inputs_of(name, 3))
    assert torch.equal(value[0], expected[0])
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("ViT")])
def test_a_mask_that_a_model_looks_into_is_no_hindrance(name: str) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    whole, model = full(name), without_values(name)
    made = layer_modules(model, [3, 2], [0, 1], (inputs_of(name, 1),), {"attention_mask": mask[:1]})
    first, last = (module for module, _ in made.values())
    load_weights([first, last], whole.state_dict(), model=model)
    tokens = inputs_of(name, 2)
    got, expected = last(first(tokens, attention_mask=mask)), whole(tokens, attention_mask=mask)
    assert torch.equal(got[0], expected[0])


UNDER_OTHER_NAMES = ("Mixtral", "ViT", "ViT, classes")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNDER_OTHER_NAMES])
def test_what_transformers_saves_is_read(tmp_path: Path, name: str) -> None:
    """In shards; a head that is an embedding is saved once."""
    whole = full(name)
    whole.save_pretrained(tmp_path, max_shard_size="60KB")  # type: ignore[operator]
    model, stages = stages_without_values(name, [3, 2])
    load_weights(stages, tmp_path, model=model)
    tokens = inputs_of(name, 2)
    assert torch.equal(stages[1](stages[0](tokens))[0], whole(tokens)[0])


@pytest.mark.parametrize("name", UNDER_OTHER_NAMES)
def test_what_transformers_saves_under_other_names_is_refused(tmp_path: Path, name: str) -> None:
    full(name).save_pretrained(tmp_path)  # type: ignore[operator]
    model, stages = stages_without_values(name, [3, 2])
    with pytest.raises(PipelineUsageError, match=r"lacks \d+ names of the module, .*; it has"):
        load_weights(stages, tmp_path, model=model)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.table


class Model(nn.Module):
    """An embedding that is the head, too, and layers with buffers of both kinds."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


EXAMPLE = (torch.tensor([[1, 2]]),)


def cut(model: nn.Module, *stages: int) -> list[nn.Module]:
    return [module for module, _ in layer_modules(model, [2, 1], stages, EXAMPLE).values()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["without weights", "in memory"])
def test_every_form_of_weights_is_read_bit_for_bit(tmp_path: Path, form: str, kind: str) -> None:
    whole = Model()
    whole.layers[1].scale.fill_(7)  # type: ignore[union-attr, operator]
    with without_weights():
        model = Model()
    if kind == "in memory":
        model = Model()
    stages = cut(model, 0, 1)
    load_weights(stages, write(form, whole.state_dict(), tmp_path), model=model)
    state = whole.state_dict()
    for stage in stages:
        assert all(torch.equal(value, state[name]) for name, value in stage.state_dict().items())
    assert model.head.weight is model.embedding.weight is stages[1].head.weight  # type: ignore[union-attr]
    x = torch.tensor([[0, 3, 4]])
    assert torch.equal(stages[1](stages[0](x)), whole(x))


def test_only_the_stages_tensors_are_read() -> None:
    with without_weights():
        model = Model()
    noted = Noted(Model().state_dict())
    (last,) = cut(model, 1)
    noted.state = {name: value for name, value in noted.state.items() if name != "head.weight"}
    load_weights(last, noted, model=model)
    assert set(noted.read) == {
        "embedding.weight",  # the head, under the only name that there is
        "layers.2.linear.weight", "layers.2.linear.bias", "layers.2.scale",
    }  # fmt: skip
    assert model.layers[0].linear.weight.is_meta  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("kind", "write_one"), [("model.safetensors", write_safetensors), ("pytorch_model.bin", write_torch)]
)
def test_shards_of_other_stages_are_not_opened(tmp_path: Path, kind: str, write_one: Callable[..., None]) -> None:
    files = write_shards(Model().state_dict(), tmp_path, kind, write_one)
    for name, file in files.items():
        if "layers.0" in name:
            file.unlink()
        elif "layers.1" in name:
            file.write_bytes(b"no tensors")
    with without_weights():
        model = Model()
    load_weights(cut(model, 1), tmp_path, model=model)
    with pytest.raises(PipelineUsageError, match=r"is missing, which .*index.json says has layers.0."):
        load_weights(cut(model, 0), tmp_path, model=model)


def test_a_distributed_checkpoint_is_listed_without_its_values_and_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    weights = open_weights(write("distributed", Model().state_dict(), tmp_path))
    assert set(weights.names() or ()) == Model().state_dict().keys()
    for file in (tmp_path / "distributed").glob("*.distcp"):
        file.unlink()
    with without_weights():
        model = Model()
    with pytest.raises(PipelineUsageError, match="cannot be read: .*distcp"):  # so the values were in these
        load_weights(cut(model, 1), weights, model=model)
    assert model.head.weight.is_meta


def test_parameters_stay_the_objects_that_they_are() -> None:
    with without_weights():
        model = Model()
    model.layers[0].linear.requires_grad_(False)  # type: ignore[union-attr, operator]
    model.layers[1].linear.weight.mark = 3  # type: ignore[union-attr, assignment]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stages = cut(model, 0, 1)
    load_weights(stages, Model().state_dict(), model=model)
    assert not stages[0].layers[0].linear.weight.requires_grad  # type: ignore[union-attr, index]
    assert stages[0].layers[1].linear.weight.mark == 3  # type: ignore[union-attr, index]
    assert isinstance(stages[0].layers[1].linear.weight, nn.Parameter)  # type: ignore[union-attr, index]
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert {parameter for stage in stages for parameter in stage.parameters()} == held
    before = copy.deepcopy(stages[1].state_dict())
    stages[1](stages[0](torch.tensor([[1]]))).sum().backward()
    optimizer.step()
    assert not torch.equal(stages[1].state_dict()["head.weight"], before["head.weight"])


def test_without_weights_holds_only_within_it_and_keeps_what_is_shared() -> None:
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    with without_weights():
        one, other, model = nn.Module(), nn.Module(), Model()
        one.weight = other.weight = parameter
    assert one.weight is other.weight and one.weight.is_meta and not one.weight.requires_grad
    assert model.head.weight is model.embedding.weight
    assert all(each.is_meta for each in model.parameters()) and not any(each.is_meta for each in model.buffers())
    assert not any(each.is_meta for each in Model().parameters())


@given(
    given_as=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    wanted=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    size=st.floats(0.0, 1e5),
    in_memory=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_floating_numbers_become_the_modules_as_to_makes_them(
    given_as: torch.dtype, wanted: torch.dtype, size: float, in_memory: bool
) -> None:
    value = (torch.randn(4, 4, dtype=torch.float64) * size).to(given_as)
    with torch.device("cpu" if in_memory else "meta"):
        module = nn.Linear(4, 4, bias=False, dtype=wanted)
    cast = value.to(wanted)
    if bool((cast.isfinite() == value.isfinite()).all()):
        load_weights(module, {"weight": value})
        assert module.weight.dtype == wanted and torch.equal(module.weight, cast)
    else:
        with pytest.raises(PipelineUsageError, match="numbers too large for torch.float16"):
            load_weights(module, {"weight": value})


def _changed(**changes: Any) -> dict[str, Any]:
    """The weights of a model, some of them others; None leaves one out."""
    state = {**Model().state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in state.items() if value is not None}


def _prefixed(prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in Model().state_dict().items()}


class Own(nn.Parameter):
    pass


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (_changed(layers__0__scale=None), r"lacks 1 names of the module, layers.0.scale; it has layers.\d.scale"),
        (_prefixed("model."), r"has model.embedding.weight: open_weights\(.*name.removeprefix\('model.'\)\)"),
        (lambda name: {}[name], "lacks 10 names of the module, embedding.weight, layers.0.scale, layers.0.linear.we"),
        ({}, "it has none at all"),
        (_changed(layers__0__scale=torch.ones(1)), r"layers.0.scale in .* has the shape \(1,\), and the model's \(\)"),
        (_changed(layers__0__scale=torch.tensor(1)), "has torch.int64, and the model's torch.float32: only floating"),
        (_changed(layers__0__scale=torch.tensor(1j)), "has torch.complex64, and the model's torch.float32"),
        (_changed(layers__0__scale=torch.tensor(1.0).to(torch.float8_e4m3fn)), "has torch.float8_e4m3fn"),
        (_changed(layers__0__scale=2.0), "is a float, not a tensor"),
        (_changed(layers__0__scale=Own(torch.tensor(2.0))), "is a Own: give it as a plain tensor"),
        (_changed(layers__0__linear__weight=torch.eye(4).to_sparse()), "is quantised or not dense"),
        (_changed(layers__0__linear__weight=torch.empty(4, 4, device="meta")), "is on the meta device, without values"),
        (_changed(head__weight=torch.zeros(5, 4)), "embedding.weight and head.weight are one parameter .* untie them"),
        (Model(6).state_dict(), "has 9 names that the model does not, layers.3.linear.bias, .* of another model"),
        (_changed(layers__0__linear__lora=torch.ones(1)), "has 1 names that the model does not, layers.0.linear.lora"),
        (7, "weights are a path, a mapping .* not a int"),
    ],
)
@pytest.mark.parametrize("kind", ["without weights", "in memory"])
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(weights: Any, words: str, kind: str) -> None:
    with without_weights():
        model = Model()
    if kind == "in memory":
        model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PipelineUsageError, match=words):
        load_weights(cut(model, 0, 1), weights, model=model)
    for name, value in model.state_dict().items():
        assert value.is_meta == before[name].is_meta and (value.is_meta or torch.equal(value, before[name]))


def test_names_of_a_base_model_are_renamed() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = Model()

    outer = Outer()
    state = Model().state_dict()
    with pytest.raises(PipelineUsageError, match=r"it has embedding.weight: .*lambda name: 'base.' \+ name"):
        load_weights(outer, state)
    load_weights(outer, open_weights(state, rename=lambda name: "base." + name), model=outer)
    assert torch.equal(outer.base.head.weight, state["head.weight"])
    more = {**state, "other": torch.ones(1)}
    load_weights(Model(), open_weights(more, rename=lambda name: None if name == "other" else name), model=Model())
    with pytest.raises(PipelineUsageError, match="rename gives .* one name, same"):
        open_weights(state, rename=lambda name: "same")
    with pytest.raises(PipelineUsageError, match="does not list its names: rename in the function"):
        open_weights(state.__getitem__, rename=lambda name: name)


def test_tensors_without_values_that_no_checkpoint_holds_are_refused_with_the_mend() -> None:
    with torch.device("meta"):
        model, hidden = Model(), Layer()
        hidden.factor = torch.ones(2)  # type: ignore[assignment]
    with pytest.raises(PipelineUsageError, match=r"layers.0.table, layers.1.table on the meta device.*without_weights"):
        load_weights(cut(model, 0), Model().state_dict(), model=model)
    hidden.table = torch.arange(4.0)
    with pytest.raises(PipelineUsageError, match=r"factor on the meta device"):
        load_weights(hidden, Layer().state_dict())


def test_modules_whose_tensors_cannot_be_filled_are_refused() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(PipelineUsageError, match="_extra_state is a state of the module's own"):
        load_weights(Stateful(2, 2), {})
    with pytest.raises(PipelineUsageError, match="weight of the module is a UninitializedParameter"):
        load_weights(nn.LazyLinear(2), {})
    with torch.device("meta"):
        module = nn.Linear(4, 4)
        module.other = nn.Parameter(module.weight.detach()[0])
    with pytest.raises(PipelineUsageError, match="other and weight look at the same memory"):
        load_weights(module, {})


def test_a_parameter_that_is_in_use_is_named() -> None:
    with without_weights():
        module = nn.Linear(2, 2)
    user = weakref.ref(module.weight)
    with pytest.raises(PipelineUsageError, match="weight cannot be given memory, as something still uses it"):
        load_weights(module, nn.Linear(2, 2).state_dict())
    assert user() is module.weight


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no weights: name the file"),
        ({"model.safetensors": b"", "model.safetensors.index.json": b""}, "which may differ: name the one"),
        ({".metadata": b"", "pytorch_model.bin": b""}, "which may differ: name the one"),
        ({"model.safetensors": b"nothing"}, "is no file of safetensors"),
        ({"pytorch_model.bin": b"nothing"}, "is no file of tensors that torch.save wrote"),
        ({"model.safetensors.index.json": b"{}"}, 'has no "weight_map"'),
    ],
)
def test_folders_and_files_that_cannot_be_read_are_said(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PipelineUsageError, match=words):
        open_weights(tmp_path)
    with pytest.raises(PipelineUsageError, match="there are no weights at"):
        open_weights(tmp_path / "nowhere.pt")


def test_safetensors_come_before_a_file_of_torch(tmp_path: Path) -> None:
    write_safetensors({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    write_torch({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert open_weights(tmp_path).read(["x", "y"]) == {"x": torch.ones(1)}


def test_safetensors_that_are_not_installed_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(PipelineUsageError, match="not installed: pip install safetensors"):
        open_weights(tmp_path)


def test_a_file_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"x": Path("anything").joinpath, "layers": LAYERS}, tmp_path / "weights.pt")
    with pytest.raises(PipelineUsageError, match="UnpicklingError"):
        open_weights(tmp_path / "weights.pt")
