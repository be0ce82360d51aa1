"""Regions compiled with our backend: their backward graph is cut, I runs dI and W runs dW."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.utils.flop_counter import FlopCounterMode

from pp_runtime._backward import stage_backward_input, stage_backward_weight
from pp_runtime.errors import PipelineUsageError
from tests.helpers import api
from tests.helpers.backward_halves import Gradients, assert_same, fresh, split, tensors_of, weights_of, whole
from tests.helpers.compiled_models import CUT, WIDTH, CheckpointedLayers, Layers, Norms, Transformer, random

pytestmark = api.ours_only("refuses compiled stages in split backwards")

ROOT = Path(__file__).resolve().parents[2]
EAGER = {"compiler": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.DEBUG, "pp_runtime.running.compiled")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("pp_runtime")]


def compiled(kind: Callable[[], nn.Module], options: dict[str, Any] = EAGER) -> nn.Module:
    model = kind()
    model.compile(backend="pp_runtime", options=options)
    return model


def seeded(run: Callable[..., Gradients], model: nn.Module, inputs: Any) -> Gradients:
    torch.manual_seed(1)
    return run(model, inputs)


@pytest.mark.parametrize("name", CUT)
def test_gradients_equal_those_of_the_whole_backward(name: str, logged: Callable[[], list[str]]) -> None:
    kind, inputs_of = CUT[name]
    model, inputs = compiled(kind), inputs_of()
    expected = seeded(whole, model, inputs)
    for _ in range(2):
        assert_same(expected, seeded(split, model, inputs))
    assert ["is cut: dI makes" in line for line in logged()] == [True]


@pytest.mark.parametrize("name", [name for name in CUT if name != "recurrent"])
def test_gradients_equal_the_eager_models(name: str) -> None:
    # A recurrent model's graph adds a weight's gradients up in another sequence than the engine.
    kind, inputs_of = CUT[name]
    model, plain, inputs = compiled(kind), kind(), inputs_of()
    plain.load_state_dict(model.state_dict())
    assert_same(seeded(whole, plain, inputs), seeded(split, model, inputs))


def halves_of(model: nn.Module, inputs: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """I and W of one microbatch, to be called in turn."""
    inputs = fresh(inputs)
    outputs = [output for output in tensors_of(model(*inputs)) if output.requires_grad]
    groups: list[Any] = []

    def run_input_half() -> None:
        ones = [torch.ones_like(output) for output in outputs]
        groups.extend(stage_backward_input(outputs, ones, inputs, model.parameters())[1])

    return run_input_half, lambda: stage_backward_weight(model.parameters(), groups) and None


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# In "checkpointed" torch's counter knows no attention that draws random numbers.
@pytest.mark.parametrize("name", [name for name in CUT if name != "checkpointed"])
def test_each_half_does_its_own_products_and_none_twice(name: str) -> None:
    kind, inputs_of = CUT[name]
    model, inputs = compiled(kind), inputs_of()
    outputs = [output for output in tensors_of(model(*fresh(inputs))) if output.requires_grad]
    all_flops = flops(lambda: torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs]))
    run_input_half, run_weight_half = halves_of(model, inputs)
    of_inputs, of_weights = flops(run_input_half), flops(run_weight_half)
    assert of_inputs > 0 and of_weights > 0
    assert of_inputs + of_weights == all_flops


def test_a_checkpoint_is_recomputed_once_for_both_halves() -> None:
    model = compiled(CheckpointedLayers)
    run_input_half, run_weight_half = halves_of(model, (random(4, WIDTH),))
    product = 2 * 4 * WIDTH * 2 * WIDTH
    assert flops(run_input_half) == 2 * product + 2 * product  # recomputed, and of dI
    assert flops(run_weight_half) == 2 * product


def test_weights_get_their_gradients_in_the_weight_half() -> None:
    model = compiled(Layers)
    seen: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.update([name]))
    run_input_half, run_weight_half = halves_of(model, (random(4, WIDTH),))
    run_input_half()
    assert not seen and all(weight.grad is None for weight in model.parameters())
    run_weight_half()
    assert seen == {name: 1 for name, _ in model.named_parameters()}


def test_several_microbatches_in_flight() -> None:
    model = compiled(Transformer)
    batches = [(torch.randn(2, 5, WIDTH, requires_grad=True),) for _ in range(3)]
    for batch in batches:
        outputs = model(*fresh(batch))
        outputs.sum().backward()
    expected = {name: weight.clone() for name, weight in weights_of(model).items() if weight is not None}
    model.zero_grad()
    halves = [halves_of(model, batch) for batch in batches]
    for run_input_half, _ in halves:
        run_input_half()
    for _, run_weight_half in halves:
        run_weight_half()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_training_and_evaluation_by_turns_and_a_reset() -> None:
    model, plain = compiled(Layers), Layers()
    plain.load_state_dict(model.state_dict())
    inputs = (random(4, WIDTH),)
    for turn in range(4):
        assert_same(whole(plain, inputs), split(model, inputs))
        with torch.no_grad():
            torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=0, atol=0)
        if turn == 1:
            torch.compiler.reset()


def test_sizes_that_change(logged: Callable[[], list[str]]) -> None:
    model, plain = Transformer(), Transformer()
    model.compile(backend="pp_runtime", dynamic=True, options=EAGER)
    plain.load_state_dict(model.state_dict())
    for rows, length in ((2, 5), (3, 7), (2, 9), (4, 5)):
        inputs = (torch.randn(rows, length, WIDTH, requires_grad=True),)
        assert_same(whole(plain, inputs), split(model, inputs))
    cuts = [line for line in logged() if "is cut" in line]
    assert 1 <= len(cuts) < 4, logged()


def test_a_compiler_that_assumes_a_size_for_a_half_gets_the_whole_graph(logged: Callable[[], list[str]]) -> None:
    compiling: list[bool] = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        is_half = any(node.name.startswith("half_") for node in graph.graph.nodes)
        compiling.append(is_half)
        if is_half:
            assert [size for size in inputs if isinstance(size, torch.SymInt)][0] > 2  # a new condition
        return graph.forward

    model, plain = Transformer(), Transformer()
    model.compile(backend="pp_runtime", dynamic=True, options={"compiler": compile_graph})
    plain.load_state_dict(model.state_dict())
    for rows in (5, 3):
        inputs = (torch.randn(rows, 6, WIDTH, requires_grad=True),)
        assert_same(whole(plain, inputs), split(model, inputs))
    assert True in compiling
    assert [line for line in logged() if "its halves would hold for some sizes only" in line], logged()


def test_one_compilation_and_one_cut_for_equal_blocks(logged: Callable[[], list[str]]) -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Layers() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, plain = Stage(), Stage()
    plain.load_state_dict(model.state_dict())
    for block in model.blocks:
        block.compile(backend="pp_runtime", options=EAGER)
    inputs = (random(4, WIDTH),)
    assert_same(whole(plain, inputs), split(model, inputs))
    assert len(logged()) == 1


def test_eager_blocks_compiled_functions_and_another_backends_in_one_stage() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eager, self.ours, self.theirs = Layers(), Layers(), Layers()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.theirs(attend(self.ours(self.eager(x)), self.weight) + x @ self.weight)

    def attend(x: Tensor, weight: Tensor) -> Tensor:
        return torch.softmax(x @ weight, -1) @ weight

    model = Stage()
    inputs = (random(4, WIDTH),)
    eager = whole(model, inputs)
    attend = torch.compile(attend, backend="pp_runtime", options=EAGER)
    model.ours.compile(backend="pp_runtime", options=EAGER)
    model.theirs.compile(backend="aot_eager")
    expected = whole(model, inputs)
    assert_same(eager, expected, exact=False)
    assert_same(expected, split(model, inputs))


def test_a_region_that_has_no_product_for_w_runs_whole(logged: Callable[[], list[str]]) -> None:
    model = compiled(Norms)
    inputs = (random(4, WIDTH),)
    assert_same(whole(model, inputs), split(model, inputs))
    (line,) = logged()
    assert "runs whole in I: its weight gradients take no product" in line and "the backward of compilation" in line


def test_a_graph_break_inside_leaves_two_regions_that_are_cut(logged: Callable[[], list[str]]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layers(), Layers()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = compiled(Broken)
    inputs = (random(4, WIDTH),)
    assert_same(whole(model, inputs), split(model, inputs))
    assert ["is cut" in line for line in logged()] == [True, True]


def test_a_first_stage_without_inputs_that_train_does_all_in_w() -> None:
    model = compiled(Layers)
    inputs = (random(4, WIDTH).detach(),)
    assert_same(whole(model, inputs), split(model, inputs))


def test_frozen_weights_get_no_gradient() -> None:
    model = compiled(Layers)
    model.up.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    inputs = (random(4, WIDTH),)
    assert_same(whole(model, inputs), split(model, inputs))


def test_hooks_on_what_a_region_returns_see_one_gradient() -> None:
    def gradients(run: Callable[..., Any]) -> tuple[Gradients, int]:
        calls: list[Tensor] = []

        class Hooked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.block = compiled(Layers)

            def forward(self, x: Tensor) -> Tensor:
                y = self.block(x)
                y.register_hook(lambda gradient: calls.append(gradient) or 2 * gradient)
                return y

        return run(Hooked(), (random(4, WIDTH),)), len(calls)

    (expected, calls), (got, calls_split) = gradients(whole), gradients(split)
    assert_same(expected, got)
    assert calls == calls_split == 1


def test_a_value_changed_in_place_between_the_halves_is_named() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = compiled(Direct)
    x = random(4, WIDTH).detach().requires_grad_()
    groups = stage_backward_input([model(x)], [torch.ones(4, WIDTH)], [x], model.parameters())[1]
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="changed in place between I and W"):
        stage_backward_weight(model.parameters(), groups)


@contextmanager
def counted_calls(calls: Counter[str]) -> Iterator[Callable[..., Any]]:
    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        names = [node.name for node in graph.graph.nodes]
        kind = "forward" if not any("tangents" in name for name in names) else "whole"
        if any(name.startswith("half_") for name in names):
            kind = "dI" if any(name.startswith("half_tangents") for name in names) else "dW"
        calls[f"compile {kind}"] += 1

        def run(*arguments: Any) -> Any:
            calls[kind] += 1
            return graph(*arguments)

        return run

    yield compile_graph


def test_each_graph_is_compiled_when_it_first_runs() -> None:
    calls: Counter[str] = Counter()
    with counted_calls(calls) as compile_graph:
        model = compiled(Transformer, {"compiler": compile_graph})
        inputs = (random(2, 5, WIDTH),)
        split(model, inputs)
        assert calls.pop("compile forward") == 1 and "compile whole" not in calls
        assert calls["compile dI"] + calls["compile dW"] == 2
        whole(model, inputs)
        whole(model, inputs)
        split(model, inputs)
    assert calls["compile whole"] == 1 and calls["whole"] == 2
    assert calls["compile dI"] + calls["compile dW"] == 2


def test_compilers_that_are_not_known_and_options_of_another_are_refused() -> None:
    with pytest.raises(Exception, match="knows the compilers inductor, aot_eager and functions") as refused:
        compiled(Layers, {"compiler": "nvfuser"})(random(4, WIDTH))
    assert isinstance(refused.value, PipelineUsageError) or "PipelineUsageError" in str(refused.value)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="mode and max_autotune are Inductor's"):
        compiled(Layers, {"compiler": "aot_eager", "max_autotune": True})(random(4, WIDTH))


def test_a_half_may_not_overwrite_its_arguments() -> None:
    donated: dict[bool, list[int]] = {}

    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        is_half = any(node.name.startswith("half_") for node in graph.graph.nodes)
        metadata = TracingContext.get().fw_metadata
        donated[is_half] = metadata.bw_donated_idxs
        return graph.forward

    model = compiled(Layers, {"compiler": compile_graph})
    inputs = (random(4, WIDTH),)
    split(model, inputs)
    whole(model, inputs)
    assert donated[True] == [] and donated[False], donated


# The second is laid out with channels last where it is compiled, and so is what dI keeps for dW.
@pytest.mark.parametrize("name", ["many norms", "convolutions"])
def test_inductor_compiles_the_halves_too(name: str, logged: Callable[[], list[str]]) -> None:
    kind, inputs_of = CUT[name]
    model, plain, inputs = compiled(kind, {}), kind(), inputs_of()
    plain.load_state_dict(model.state_dict())
    for run in (split, whole, split):
        assert_same(whole(plain, inputs), run(model, inputs), exact=False)
    assert ["is cut" in line for line in logged()] == [True]


CACHED = """
import torch
from torch._dynamo.utils import counters
from pp_runtime._backward import stage_backward_input, stage_backward_weight
from tests.helpers.compiled_models import ManyNorms, WIDTH

torch.manual_seed(0)
model = ManyNorms()
model.compile(backend="pp_runtime")
for split in (True, False):
    x = torch.ones(4, WIDTH, requires_grad=True)
    output = model(x)
    if split:
        groups = stage_backward_input([output], [torch.ones_like(output)], [x], model.parameters())[1]
        stage_backward_weight(model.parameters(), groups)
    else:
        output.sum().backward()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_the_compilers_cache_on_disk_serves_all_four_graphs(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    counted = [
        subprocess.run(
            [sys.executable, "-c", CACHED], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=110
        )
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in counted] == [["0", "4"], ["4", "0"]], counted[-1].stderr[-2000:]
