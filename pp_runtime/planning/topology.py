"""Which outputs of which stages are the inputs of which others, read from a traced model's graph.

    model(x, mask)             root inputs: x, mask

    stage 0 (x) ─── h ──► stage 1 (h, mask) ─── g ──► stage 2 (g, h)
       │  └──── mask ────────►┘                          ▲
       └──────────────────────── h ──────────────────────┘

An edge may skip stages. A root input that a later stage uses is one more output of stage 0, so that the whole batch is
given on one rank only. A program that gives it to the later stage as a keyword argument, as torch wants it, may do so.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from pp_runtime.errors import PipelineUsageError


@dataclass(frozen=True, slots=True)
class PipeInfo:
    """What a stage knows of the split model it is of: how the stages are called, and which parameters they share."""

    graph: fx.Graph
    num_stages: int
    has_loss_and_backward: bool = False
    tied_parameters: tuple[tuple[tuple[int, str], ...], ...] = ()

    @staticmethod
    def of(graph: fx.Graph, num_stages: int, has_loss_and_backward: bool, tied: Any) -> PipeInfo:
        """With a graph of its own: the split model's own one would keep the modules of all stages alive."""
        return PipeInfo(copy.deepcopy(graph), num_stages, has_loss_and_backward, tied)


@dataclass(frozen=True, slots=True)
class Source:
    """Where an input of a stage comes from: an output of another stage, or one of the model's own inputs."""

    stage: int | None = None
    output: int = 0
    root: str | None = None


@dataclass(frozen=True, slots=True)
class TracedEdge:
    """What goes from one stage to another: output ``outputs[i]`` of the source is input ``inputs[i]`` there."""

    source: int
    destination: int
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """The wiring of all stages of a traced model."""

    roots: tuple[str, ...]  # the model's inputs, in order
    inputs: tuple[tuple[Source, ...], ...]  # of each stage
    edges: tuple[TracedEdge, ...]


@dataclass(frozen=True, slots=True)
class StageWiring:
    """One stage's view of the wiring of all."""

    stage_index: int
    topology: Topology

    @property
    def edges(self) -> tuple[TracedEdge, ...]:
        """All edges of the model."""
        return self.topology.edges

    @property
    def inputs(self) -> tuple[Source, ...]:
        """Where each positional input of this stage comes from."""
        return self.topology.inputs[self.stage_index]


def stage_wiring(pipe_info: Any, stage_index: int) -> StageWiring:
    """The wiring of a stage, from ``pipe.info()``."""
    topology = read_topology(pipe_info.graph)
    if len(topology.inputs) != pipe_info.num_stages:
        raise PipelineUsageError(
            f"the traced graph calls {len(topology.inputs)} stages but the pipe has {pipe_info.num_stages}: "
            "trace the model again with pipeline()"
        )
    if not isinstance(pipe_info, PipeInfo) and len(topology.roots) > 1:
        # Its first stage takes the model's inputs by place, in an order that is not the signature's.
        raise PipelineUsageError(
            f"stage {stage_index} was split off by torch's own tracer, which mixes up the inputs of a model of "
            f"several ({', '.join(topology.roots)}): split the model with pp_runtime.pipeline()"
        )
    return StageWiring(stage_index, topology)


def traced_topology(pipe: Any) -> Topology:
    """The wiring of all stages of what ``pipeline()`` returned."""
    return read_topology(pipe.info().graph)


def read_topology(graph: fx.Graph) -> Topology:
    """The wiring in the outer graph of a traced model, whose modules are the stages."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    stage_of = {node: index for index, node in enumerate(calls)}
    inputs = tuple(tuple(_source(arg, stage_of) for arg in call.args) for call in calls)
    for stage, sources in enumerate(inputs):
        if stage > 0 and any(source.root is not None for source in sources):
            raise PipelineUsageError(
                f"stage {stage} takes an input of the model that stage 0 does not send on: "
                "split the model with pp_runtime.pipeline()"
            )
    roots = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    return Topology(roots, inputs, _edges(inputs))


def run_stages(split: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a split model whole: the first stage takes what the model takes, each other one what its edges bring."""
    values: dict[fx.Node, Any] = {}
    for node in split.graph.nodes:
        if node.op == "call_module":
            module = split.get_submodule(str(node.target))
            first = not values
            values[node] = module(*args, **kwargs) if first else module(*(values[arg] for arg in node.args))
        elif node.op == "call_function":
            source, place = node.args
            values[node] = values[source][place]
    (output,) = (node for node in split.graph.nodes if node.op == "output")
    return fx.node.map_arg(output.args[0], lambda node: values[node])


def _source(arg: Any, stage_of: dict[fx.Node, int]) -> Source:
    output = 0
    node: Any = arg
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        call, index = node.args
        node, output = call, int(index)  # type: ignore[arg-type]
    if isinstance(node, fx.Node) and node.op == "placeholder":
        return Source(root=str(node.target))
    if node in stage_of:
        return Source(stage_of[node], output)
    raise PipelineUsageError(
        f"the traced graph gives {arg!r} to a stage, which is neither an output of a stage nor an input of the model: "
        "split the model at another place"
    )


def _edges(inputs: Sequence[Sequence[Source]]) -> tuple[TracedEdge, ...]:
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for destination, sources in enumerate(inputs[1:], start=1):
        for position, source in enumerate(sources):
            if source.stage is not None:
                pairs.setdefault((source.stage, destination), []).append((source.output, position))
    return tuple(
        TracedEdge(source, destination, tuple(o for o, _ in ends), tuple(i for _, i in ends))
        for (source, destination), ends in sorted(pairs.items())
    )
