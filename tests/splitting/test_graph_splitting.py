"""What a traced model's stages hold and compute: state under its names, ties, changes in place, places to split."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.traced_device import set_device
from pp_runtime.splitting.tracing import SplitPoint, annotate_split_points, pipe_split, pipeline

BEGIN, END = SplitPoint.BEGINNING, SplitPoint.END


class Tied(nn.Module):
    """The first and the last layer have one weight; so have the two in the middle, with one more in the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.a, self.b, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Parameter(torch.ones(4), False)
        self.head.weight, self.b.weight = self.embedding.weight, self.a.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) * self.frozen
        return self.head(self.b(self.a(hidden)) * self.frozen)


TIED_PLACES = (
    ((0, "embedding.weight"), (2, "head.weight")),
    ((0, "frozen"), (2, "frozen")),
    ((1, "a.weight"), (2, "b.weight")),
)
TOKENS = torch.tensor([[0, 4], [2, 2]])


def test_tied_parameters_are_declared_and_each_stage_has_its_own() -> None:
    model = Tied()
    pipe = pipeline(copy.deepcopy(model), (TOKENS,), split_spec={"a": BEGIN, "b": BEGIN})
    assert pipe.info().tied_parameters == TIED_PLACES
    stages = [pipe.get_stage_module(index) for index in range(3)]
    for places in TIED_PLACES:
        parameters = [stages[stage].get_parameter(name) for stage, name in places]
        assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)
        assert all(torch.equal(parameter, parameters[0]) for parameter in parameters)
        assert all(
            parameter.requires_grad is model.get_parameter(places[0][1]).requires_grad for parameter in parameters
        )
    pipe(TOKENS)[0].sum().backward()
    model(TOKENS).sum().backward()
    for stage, name in ((0, "embedding.weight"), (1, "a.weight")):
        total = sum(
            stages[s].get_parameter(n).grad for places in TIED_PLACES if (stage, name) in places for s, n in places
        )
        torch.testing.assert_close(total, model.get_parameter(name).grad)


def test_two_names_in_one_stage_are_one_parameter() -> None:
    pipe = pipeline(Tied(), (TOKENS,), split_spec={"b": BEGIN})
    assert pipe.info().tied_parameters[0] == ((0, "a.weight"), (1, "b.weight"))
    whole = pipeline(Tied(), (TOKENS,), split_spec={"head": END})
    assert whole.num_stages == 1 and whole.info().tied_parameters == ()
    stage = whole.get_stage_module(0)
    assert stage.head.weight is stage.embedding.weight
    assert set(stage.state_dict()) == set(Tied().state_dict())
    copied = copy.deepcopy(stage).double()
    assert copied.head.weight is copied.embedding.weight and copied.head.weight.dtype is torch.float64


def test_copies_and_moves_of_a_stage_keep_ties_and_names() -> None:
    pipe = pipeline(Tied(), (TOKENS,), split_spec={"a": BEGIN, "b": BEGIN})
    copied = copy.deepcopy(pipe)
    assert copied.info().tied_parameters == TIED_PLACES
    assert torch.equal(copied(TOKENS)[0], pipe(TOKENS)[0])
    for index in range(3):
        stage = pipe.get_stage_module(index)
        moved = copy.deepcopy(stage).to(torch.float64)
        names = dict(moved.named_parameters())
        assert list(names) == [name for name, _ in stage.named_parameters()]
        assert {name for places in TIED_PLACES for stage_index, name in places if stage_index == index} <= set(names)
        assert {parameter.dtype for parameter in names.values()} == {torch.float64}


class Stateful(nn.Module):
    """Buffers that a forward changes, and constants, on both sides of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.ones(4), persistent=False)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.constant = torch.full((4,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        x = self.norm(x) * self.mean + self.table
        return self.linear(x) * self.constant + torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.table


def test_buffers_change_as_in_the_model_and_state_dicts_have_its_names() -> None:
    model, x = Stateful(), torch.randn(6, 4)
    pipe = pipeline(copy.deepcopy(model), (x,), split_spec={"linear": BEGIN})
    stages = [pipe.get_stage_module(0), pipe.get_stage_module(1)]
    for _ in range(2):
        assert torch.equal(pipe(x)[0], model(x))
    state = {name: value for stage in stages for name, value in stage.state_dict().items()}
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(stages[0].mean, model.mean)
    copied = copy.deepcopy(stages[1])
    assert list(copied.state_dict()) == list(stages[1].state_dict()) == ["linear.weight", "linear.bias"]
    assert {value.dtype for value in copied.half().buffers()} == {torch.float16} and list(copied.buffers())


class Sharing(nn.Module):
    """Two layers, between which the hidden state is changed in a way that a subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("count", torch.zeros(4))


class ChangesView(Sharing):
    """Two views go to the next stage, which changes one; the other is used there or later."""

    def __init__(self, later: bool) -> None:
        super().__init__()
        self.later = later

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) + 0
        view = hidden.view(-1)
        pipe_split()
        view.mul_(2)
        value = self.second(view.view(-1, 4))
        if self.later:
            pipe_split()
        return self.third(value + hidden)


class ChangesState(Sharing):
    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.third(self.second(self.first(x) + self.count)) + self.count


class AssignsState(Sharing):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) + self.count
        hidden = self.second(hidden)
        self.count = self.count + hidden.mean(0)
        return self.third(hidden)


class Passes(Sharing):
    """The stage that changes a value in place hands it on, so every later one has it as it is."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        pipe_split()
        second = self.second(hidden.relu_())
        return self.third(second) + hidden


CUTS = {"second": BEGIN, "third": BEGIN}


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (ChangesView(later=False), None, "stage 1 changes 'add' in place .* uses other views of it"),
        (ChangesView(later=True), None, "stage 1 changes 'add' in place .*, which stage 2 uses too"),
        (AssignsState(), CUTS, "stage 1 changes 'count' in place .*, which stage 0 uses too"),
    ],
)
def test_changes_that_another_stage_would_miss_are_refused(model: nn.Module, spec: Any, message: str) -> None:
    with pytest.raises(PipelineUsageError, match=message):
        pipeline(model, (torch.randn(2, 4),), split_spec=spec)


def test_a_changed_state_is_sent_as_it_was() -> None:
    """The next microbatch changes it again, perhaps before it is sent."""
    model, x = ChangesState(), torch.randn(2, 4)
    pipe = pipeline(copy.deepcopy(model), (x,), split_spec=CUTS)
    first, second, third = (pipe.get_stage_module(index) for index in range(3))
    sent = [first(x), first(x)]
    for hidden, count in sent:
        assert torch.equal(third(second(hidden), count), model(x))
    assert torch.equal(first.count, model.count)


class AssignsAfterUse(Sharing):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.count.view(1, 4)
        hidden = self.first(x) + scale
        self.count = self.count + hidden.detach().abs().mean(0)
        return self.third(self.second(hidden)) + scale


def test_an_assigned_state_is_sent_as_it_was_read() -> None:
    model, x = AssignsAfterUse(), torch.randn(2, 4)
    pipe = pipeline(copy.deepcopy(model), (x,), split_spec=CUTS)
    for _ in range(3):
        assert torch.equal(pipe(x)[0], model(x))
    assert torch.equal(pipe.get_stage_module(0).count, model.count)


def test_a_changed_value_is_passed_on() -> None:
    model, x = Passes(), torch.randn(2, 4)
    pipe = pipeline(model, (x,), split_spec={"third": BEGIN})
    assert pipe.num_stages == 3 and torch.equal(pipe(x)[0], model(x))


class Plain(Sharing):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.third(self.second(hidden)) + hidden


class Regions(Sharing):
    """Values go into and out of regions that the tracer keeps whole, and through all stages."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.count + x.abs().mean()
        with torch.autocast("cpu", enabled=False):
            hidden = self.first(x) * scale
        with torch.no_grad():
            gate = torch.sigmoid(hidden) * scale
        return self.third(self.second(hidden) * gate) + scale


def test_values_of_regions_reach_every_stage_that_uses_them() -> None:
    model, x = Regions(), torch.randn(2, 4)
    pipe = pipeline(model, (x,), split_spec=CUTS)
    (output,), expected = pipe(x), model(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    got = {name: p.grad.clone() for stage in pipe.split_gm.children() for name, p in stage.named_parameters()}
    model.zero_grad()
    expected.sum().backward()
    assert got.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(grad, model.get_parameter(name).grad) for name, grad in got.items())


def test_a_split_inside_a_region_is_refused() -> None:
    class Inside(Sharing):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.second(self.first(x))
            return self.third(x)

    with pytest.raises(PipelineUsageError, match="inside a region"):
        pipeline(Inside(), (torch.randn(2, 4),), split_spec={"second": BEGIN})


class Outputs(Sharing):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        first = self.first(x)
        return {"last": self.second(first), "first": first, "given": y, "none": None}


def test_the_last_stage_returns_what_earlier_ones_made() -> None:
    model, x, y = Outputs(), torch.randn(2, 4), torch.randn(2, 4)
    pipe = pipeline(model, (x, y), split_spec={"second": BEGIN})
    expected = model(x, y)
    last, first, given, none = pipe(x, y)
    assert torch.equal(last, expected["last"]) and torch.equal(first, expected["first"]) and given is y and none is None


def test_split_points_are_of_one_trace_and_must_be_met() -> None:
    model, x = Plain(), torch.randn(2, 4)
    assert pipeline(model, (x,), split_spec=CUTS).num_stages == 3
    assert pipeline(model, (x,), split_spec={"third": BEGIN}).num_stages == 2
    assert "forward" not in model.second.__dict__
    model.spare = nn.Linear(4, 4)
    with pytest.raises(PipelineUsageError, match="names 2 split points .* ran through 1"):
        pipeline(model, (x,), split_spec={"third": BEGIN, "spare": BEGIN})
    with pytest.raises(AttributeError, match="no module 'fourth'"):
        pipeline(model, (x,), split_spec={"fourth": BEGIN})
    with pytest.raises(ValueError, match="only one of them"):
        pipeline(model, (x,), split_spec=CUTS, split_policy=lambda graph: graph)


def test_splits_that_fall_together_make_no_empty_stage() -> None:
    model, x = Plain(), torch.randn(2, 4)
    pipe = pipeline(model, (x,), split_spec={"first": BEGIN, "second": END, "third": BEGIN})
    assert pipe.num_stages == 2 and torch.equal(pipe(x)[0], model(x))


def test_annotated_models_split_themselves() -> None:
    model, x = Plain(), torch.randn(2, 4)
    expected = model(x)
    annotate_split_points(model, {"second": END})
    assert torch.equal(model(x), expected)
    assert pipeline(model, (x,)).num_stages == 2
    with pytest.raises(ValueError, match="SplitPoint.BEGINNING or"):
        annotate_split_points(model, {"first": "beginning"})  # type: ignore[dict-item]


def test_what_a_stage_knows_of_the_pipe_keeps_no_other_stage_alive() -> None:
    pipe = pipeline(Plain(), (torch.randn(2, 4),), split_spec=CUTS)
    info, other = pipe.info(), weakref.ref(pipe.get_stage_module(1))
    del pipe
    gc.collect()
    assert other() is None and info.num_stages == 3


class Drops(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.first, self.second, self.p = nn.Linear(4, 4), nn.Linear(4, 4), p

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)[None, None]
        dropped = nn.functional.dropout(hidden, self.p, self.training)
        p = self.p if self.training else 0.0
        return self.second(nn.functional.scaled_dot_product_attention(dropped, dropped, dropped, dropout_p=p))[0, 0]


@pytest.mark.parametrize("traced_in", [True, False])
def test_a_mode_that_the_graph_does_not_follow_is_warned_of(traced_in: bool) -> None:
    first = pipeline(Drops(0.5).train(traced_in), (torch.randn(2, 4),), split_spec={"second": BEGIN}).get_stage_module(
        0
    )
    assert first.training is traced_in
    for module in (first, copy.deepcopy(first)):
        with pytest.warns(UserWarning, match=f"traced in {('eval', 'train')[traced_in]} mode"):
            module.train(not traced_in)
        assert module.training is not traced_in


def test_a_mode_that_does_not_matter_is_taken_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    first = pipeline(Drops(0.0), (torch.randn(2, 4),), split_spec={"second": BEGIN}).get_stage_module(0)
    assert not first.eval().training and first.train().training
    assert not [warning for warning in recwarn if "mode" in str(warning.message)]


class MakesTensors(Sharing):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) + torch.arange(4, device=x.device)
        with torch.no_grad():
            mask = torch.ones(4, 4).to(x.device).tril()
        pipe_split()
        return self.second(hidden) + self.count + torch.tensor([1.0, 2.0, 3.0, 4.0]) + mask[:2]


def test_stages_compute_on_another_device_than_the_trace() -> None:
    """What a GPU would do, on the device without memory; a tensor left on the CPU is an error there."""
    pipe, device = pipeline(MakesTensors(), (torch.randn(2, 4),)), torch.device("meta")
    values: Any = (torch.randn(2, 4, device=device),)
    for index in range(2):
        stage = pipe.get_stage_module(index)
        set_device(stage, device)
        values = stage.to(device)(*values)
    assert values.is_meta and values.shape == (2, 4)


def test_autocast_regions_follow_the_device_where_they_had_the_traces() -> None:
    class Casts(Sharing):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                x = self.first(x)
            with torch.autocast("xpu", enabled=False):
                return self.second(x)

    stage = pipeline(Casts(), (torch.randn(2, 4),)).get_stage_module(0)
    set_device(stage, torch.device("cuda", 1))
    assert [node.args[0] for node in stage.graph.nodes if "autocast" in str(node.target)] == ["cuda", "xpu"]
