"""What stages hand on may be nested and hold more than tensors; what cannot travel is named."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import api, ranks, reference
from tests.helpers.failures import PROMPT, Met, meet
from tests.helpers.models import WIDTH, Example, rows_of_floats
from tests.helpers.pipelines import Setting, Twins, make_schedule, make_stages, step

pytestmark = api.ours_only("sends tensors only")

SCHEDULES = [("GPipe", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]


@dataclass
class Hidden:
    """A stage's output with all that a payload may hold."""

    states: Tensor
    others: dict[str, Any]
    depth: int = 0
    names: list[str] = field(default_factory=list)


Named = namedtuple("Named", ["value", "again"])


class Nested(nn.Module):
    """Takes a tensor in the first stage, a Hidden elsewhere; leaves its mark on what is not a tensor."""

    def __init__(self, index: int, last: bool) -> None:
        super().__init__()
        self.linear, self.index, self.last = nn.Linear(WIDTH, WIDTH), index, last

    def forward(self, given: Tensor | Hidden) -> Tensor | Hidden:
        if isinstance(given, Tensor):
            given = Hidden(given, {"sum": torch.zeros(()), "pair": Named(given[:, :1], [given, None])})
        assert given.depth == self.index and given.names == [f"stage {i}" for i in range(self.index)]
        assert isinstance(given.others["pair"], Named) and given.others["pair"].again[1] is None
        states = torch.tanh(self.linear(given.states + given.others["pair"].again[0])) + given.others["pair"].value
        if self.last:
            return states + given.others["sum"]
        others = {"sum": given.others["sum"] + states.mean(), "pair": Named(states[:, :1], [states * 2, None])}
        return Hidden(states, others, given.depth + 1, [*given.names, f"stage {self.index}"])


class NamedPair(nn.Module):
    """Gives a named tuple, whose fields are the next stage's inputs; the last stage gives one too."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(WIDTH, WIDTH), last

    def forward(self, value: Tensor, again: Tensor | None = None) -> Any:
        value = torch.tanh(self.linear(value if again is None else value + again.sum(1, keepdim=True)))
        return value if self.last else Named(value, value[:, :2] * 2)


class Several(nn.Module):
    """Two positional inputs, of which the second is a dict with one tensor twice and a number."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.linear, self.first, self.last = nn.Linear(WIDTH, WIDTH), first, last

    def forward(self, x: Tensor, more: dict[str, Any] | None = None) -> Any:
        if more is not None:
            assert more["a"] is more["b"]
            x = x + more["a"] * more["scale"] + more["b"]
        x = torch.tanh(self.linear(x))
        twice = x * 0.5
        return x if self.last else (x, OrderedDict(a=twice, b=twice, scale=0.25))


def _examples(name: str, num_stages: int) -> Example:
    torch.manual_seed(7)
    if name == "nested":
        return Example([Nested(index, index == num_stages - 1) for index in range(num_stages)], exact=False)
    if name == "named":
        return Example([NamedPair(index == num_stages - 1) for index in range(num_stages)], exact=False)
    return Example([Several(index == 0, index == num_stages - 1) for index in range(num_stages)], exact=False)


def _train(rank: int, schedule: str, stages_per_rank: int, name: str) -> list[str]:
    from tests.helpers import pipelines

    pipelines.MODELS[name] = lambda num_stages: _examples(name, num_stages)
    twins = Twins(rank, Setting(schedule, 4, stages_per_rank, name))
    found = []
    for number, rows in enumerate([8, 8, 5]):
        found += twins.train(f"step {number}", twins.example.batch(rows, number))
        found += twins.evaluate(f"eval {number}", twins.example.batch(rows, number))
    return found


@pytest.mark.parametrize("name", ["nested", "several", "named"])
@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_nested_outputs_train_as_in_the_plain_model(schedule: str, stages_per_rank: int, name: str) -> None:
    assert ranks.run(_train, 2, schedule=schedule, stages_per_rank=stages_per_rank, name=name) == [[], []]


def test_nested_outputs_travel_over_c10d(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.run(_train_over_c10d, 3) == [[]] * 3


def _train_over_c10d(rank: int) -> list[str]:
    import os

    os.environ["PP_RUNTIME_TRANSPORT"] = "c10d"
    return _train(rank, "1F1B", 1, "nested")


class Ends(nn.Module):
    """A last stage that returns an object; with a function in it, one that cannot be copied."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.linear, self.copied = nn.Linear(WIDTH, WIDTH), copied

    def forward(self, x: Tensor) -> Hidden:
        states = self.linear(x)
        return Hidden(states, {"pair": [states, None if self.copied else lambda: None]}, 3)


def _end(rank: int, copied: bool) -> None:
    stages = make_stages({rank: Ends(copied) if rank else nn.Linear(WIDTH, WIDTH)}, 2)
    pipeline = make_schedule("1F1B", stages, 1, lambda output, target: F.mse_loss(output.states, target))
    outcome = step(pipeline, stages, rows_of_floats(2, 0))
    if rank:
        output = outcome.outputs
        assert type(output) is Hidden and output.depth == 3 and output.others["pair"][0] is output.states
        assert output.states.requires_grad is not copied  # what cannot be copied is given as it is


@pytest.mark.parametrize("copied", [True, False])
def test_an_object_that_the_last_stage_returns_holds_no_graph(copied: bool) -> None:
    ranks.run(_end, 2, copied=copied)


class Local:
    """What a stage may not return, each under a name."""

    @staticmethod
    def value(name: str, y: Tensor) -> Any:
        return {
            "nothing": None,
            "number": 7,
            "function": {"y": y, "mask": [lambda x: x]},
            "lock": (y, threading.Lock()),
            "sparse": (y, y.to_sparse()),
            "meta": {"y": y.to("meta")},
            "deep": Hidden(y, {"inner": {"key": (y, threading.Lock())}}),
        }[name]


class Returns(nn.Module):
    """Returns what cannot travel."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear, self.name = nn.Linear(WIDTH, WIDTH), name

    def forward(self, x: Tensor) -> Any:
        return Local.value(self.name, self.linear(x))


def _return(rank: int, name: str) -> Met | None:
    modules = {0: Returns(name), 1: nn.Linear(WIDTH, WIDTH)}
    stages = make_stages({rank: modules[rank]}, 2)
    pipeline = make_schedule("1F1B", stages, 4, F.mse_loss)
    return meet(lambda: step(pipeline, stages, rows_of_floats(8, 0)))


REFUSED = {
    "nothing": r"the output of stage 0 is None, in which there is no tensor",
    "number": r"the output of stage 0 is a int, in which there is no tensor",
    "function": r"the output\['mask'\]\[0\] of stage 0 is a function, which cannot be sent",
    "lock": r"the output\[1\] of stage 0 is a lock, which cannot be sent",
    "sparse": r"the output\[1\] of stage 0 is a Tensor of layout torch.sparse_coo on cpu, .*to_dense",
    "meta": r"the output\['y'\] of stage 0 is a Tensor on meta, which cannot be sent",
    "deep": r"the output\.others\['inner'\]\['key'\]\[1\] of stage 0 is a lock",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_travel_is_named_on_both_sides(name: str) -> None:
    sender, receiver = ranks.run(_return, 2, name=name)
    assert sender is not None and sender.is_a("StageOutputError"), sender
    assert receiver is not None and receiver.is_a("PipelineError"), receiver
    for met in (sender, receiver):
        assert met.seconds < PROMPT and re.search(REFUSED[name], met.text), met.text
        assert met.facts["stage"] == 0


def test_a_subclass_of_dict_or_tuple_stays_what_it_is() -> None:
    from pp_runtime.running.values.payload import flatten_output, rebuild_args

    x = torch.arange(3.0)
    given = OrderedDict(first=Named(x, (1, "two", None)), second=[x, {"x": x}], third=torch.float32)
    tensors, structure = flatten_output(0)(given)
    assert len(tensors) == 1 and tensors[0] is x
    (back,) = rebuild_args(1)(tensors, structure)
    assert type(back) is OrderedDict and back == given and back["first"].value is x
    assert reference.differences("x", back["second"][1]["x"], x) == []


def test_a_structure_that_is_no_structure_is_an_error() -> None:
    from pp_runtime.running.values.payload import rebuild_args

    with pytest.raises(api.errors.StageOutputError, match="stage 3 receives cannot be rebuilt"):
        rebuild_args(3)((), b"\x80\x05nonsense")
