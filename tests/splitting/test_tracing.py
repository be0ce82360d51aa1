"""Traced models: torch's tracer, and the wiring of its stages, run here stage by stage without a runtime."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from pp_runtime.errors import PipelineUsageError
from pp_runtime.planning.topology import Source, TracedEdge, stage_wiring, traced_topology
from pp_runtime.splitting import tracing
from pp_runtime.splitting.tracing import SplitPoint, pipeline


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        for other in others:
            x = x * other
        return torch.relu(self.linear(x))


class Chain(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Skips(Chain):
    """Stage 0's output goes to stage 2 as well; the mask is used by stages 1 and 2, the bias by stage 2 alone."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](x)
        second = self.layers[1](first, mask)
        return self.layers[2](second, first, mask, bias)


EVERY_LAYER = {"layers.1": SplitPoint.BEGINNING, "layers.2": SplitPoint.BEGINNING}


def run_by_wiring(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], later: dict[str, Any] | None = None) -> Any:
    """What the ranks would compute: each stage's module, called with what the edges bring."""
    received: list[dict[int, Any]] = [{} for _ in range(pipe.num_stages)]
    output: Any = None
    for index in range(pipe.num_stages):
        wiring, module = stage_wiring(pipe.info(), index), pipe.get_stage_module(index)
        if index == 0:
            output = module(*args, **kwargs)
        else:
            values = [received[index][position] for position in range(len(wiring.inputs))]
            output = module(*values, **(later or {}))
        outputs = output if isinstance(output, tuple) else (output,)
        for edge in wiring.edges:
            if edge.source == index:
                for out, position in zip(edge.outputs, edge.inputs, strict=True):
                    received[edge.destination][position] = outputs[out]
    return output


@pytest.fixture(scope="module")
def skips() -> tuple[torch.Tensor, Any, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = Skips()
    inputs = torch.randn(2, 4), torch.randn(2, 4), torch.randn(4)
    expected = model(*inputs)
    pipe = pipeline(model, inputs, split_spec=EVERY_LAYER)
    return expected, pipe, inputs


def test_chain_has_one_edge_between_neighbours() -> None:
    model, x = Chain(), torch.randn(2, 4)
    expected = model(x)
    pipe = pipeline(model, (x,), split_spec=EVERY_LAYER)
    topology = traced_topology(pipe)
    assert topology.edges == (TracedEdge(0, 1, (0,), (0,)), TracedEdge(1, 2, (0,), (0,)))
    assert topology.inputs[0] == (Source(root="x"),)
    torch.testing.assert_close(run_by_wiring(pipe, (x,), {}), expected)


def test_skip_edges_and_root_inputs_reach_later_stages(skips: Any) -> None:
    expected, pipe, inputs = skips
    topology = traced_topology(pipe)
    assert topology.roots == ("x", "mask", "bias")
    assert {(edge.source, edge.destination) for edge in topology.edges} == {(0, 1), (1, 2), (0, 2)}
    torch.testing.assert_close(run_by_wiring(pipe, inputs, {}), expected)


def test_root_inputs_may_be_keywords(skips: Any) -> None:
    expected, pipe, (x, mask, bias) = skips
    torch.testing.assert_close(run_by_wiring(pipe, (x,), {"bias": bias, "mask": mask}), expected)


def test_root_inputs_may_be_given_where_they_are_used(skips: Any) -> None:
    expected, pipe, (x, mask, bias) = skips
    output = run_by_wiring(pipe, (x,), {}, later={"mask": mask, "bias": bias})
    torch.testing.assert_close(output, expected)


def test_missing_root_input_is_named(skips: Any) -> None:
    _, pipe, (x, mask, _) = skips
    with pytest.raises(PipelineUsageError, match="'bias'"):
        run_by_wiring(pipe, (x,), {}, later={"mask": mask})


class CallsPipeSplit(Chain):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.layers[0](x)
        y = x.transpose(0, 1)
        tracing.pipe_split()
        return self.layers[1](x), y.transpose(0, 1) + 1


def test_model_may_split_itself_and_return_tuples() -> None:
    model, x = CallsPipeSplit(2), torch.randn(2, 4)
    expected = model(x)
    pipe = pipeline(model, (x,))
    assert pipe.num_stages == 2
    torch.testing.assert_close(tuple(run_by_wiring(pipe, (x,), {})), expected)


def test_pipe_is_torchs_and_ours() -> None:
    from torch.distributed import pipelining

    x = torch.randn(2, 4)
    pipe = pipeline(Chain(), (x,), split_spec={"layers.1": SplitPoint.BEGINNING})
    assert isinstance(pipe, tracing.Pipe) and isinstance(pipe, pipelining.Pipe)
    assert pipe.num_stages == 2 and pipe.info().num_stages == 2
    assert "submod_pp_1" in str(pipe) and "submod_pp_0" in repr(pipe)
    with pytest.raises(ValueError, match="stage index"):
        pipe.get_stage_module(2)
    assert tracing.SplitPoint is pipelining.SplitPoint and tracing.pipe_split is pipelining.pipe_split


def test_split_policy_splits() -> None:
    x = torch.randn(2, 4)

    def after_first_relu(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
        relu = next(node for node in graph_module.graph.nodes if "relu" in str(node.target))
        with graph_module.graph.inserting_after(relu):
            graph_module.graph.call_function(torch.ops.pippy._pipe_split.default)
        graph_module.recompile()
        return graph_module

    model = Chain()
    pipe = pipeline(model, (x,), split_policy=after_first_relu)
    assert pipe.num_stages == 2
    torch.testing.assert_close(run_by_wiring(pipe, (x,), {}), model(x))


def test_model_that_cannot_be_traced_is_a_runtime_error() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match="full graph"):
        pipeline(Branches(), (torch.ones(2),))


def test_importing_the_tracer_does_not_import_torchs() -> None:
    code = (
        "import sys, pp_runtime.splitting, pp_runtime.schedules; print('torch.distributed.pipelining' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
