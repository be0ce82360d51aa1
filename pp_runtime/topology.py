"""Which outputs of which stages are the inputs of which others, read from a traced model's graph.

    model(x, mask)             root inputs: x, mask

    stage 0 (x) ─── h ──► stage 1 (h, mask) ─── g ──► stage 2 (g, h)
       │  └──── mask ────────►┘                          ▲
       └──────────────────────── h ──────────────────────┘

An edge may skip stages. A root input that a later stage uses is one more output of stage 0, so that the whole batch is
given on one rank only. A program that gives it to the later stage as a keyword argument, as torch wants it, may do so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from pp_runtime.errors import PipelineUsageError

# What stands for a root input that the program did not give: a shape that no real one has.
_ABSENT = (0,) * 7


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
    first_outputs: int  # outputs of stage 0 that others use or stand before one that they use
    forwarded: tuple[str, ...]  # root inputs that stage 0 sends on, as its outputs after those
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

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The stage's module, as it must be called; the module itself where no root input is sent on."""
        if self.topology.forwarded and self.stage_index == 0:
            return _SendsRootInputs(module, self)
        if self.stage_index > 0 and any(source.root is not None for source in self.inputs):
            return _TakesRootInputs(module, self)
        return module


def stage_wiring(pipe_info: Any, stage_index: int) -> StageWiring:
    """The wiring of a stage, from ``pipe.info()``."""
    topology = read_topology(pipe_info.graph)
    if len(topology.inputs) != pipe_info.num_stages:
        raise PipelineUsageError(
            f"the traced graph calls {len(topology.inputs)} stages but the pipe has {pipe_info.num_stages}: "
            "trace the model again with pipeline()"
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
    later = [source for sources in inputs[1:] for source in sources]
    first_outputs = max((source.output + 1 for source in later if source.stage == 0), default=0)
    roots = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    wanted = {source.root for source in later}
    forwarded = tuple(root for root in roots if root in wanted)
    return Topology(roots, inputs, first_outputs, forwarded, _edges(inputs, first_outputs, forwarded))


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


def _edges(inputs: Sequence[Sequence[Source]], first_outputs: int, forwarded: Sequence[str]) -> tuple[TracedEdge, ...]:
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for destination, sources in enumerate(inputs[1:], start=1):
        for position, source in enumerate(sources):
            if source.stage is not None:
                pairs.setdefault((source.stage, destination), []).append((source.output, position))
            elif source.root is not None:
                output = first_outputs + forwarded.index(source.root)
                pairs.setdefault((0, destination), []).append((output, position))
    return tuple(
        TracedEdge(source, destination, tuple(o for o, _ in ends), tuple(i for _, i in ends))
        for (source, destination), ends in sorted(pairs.items())
    )


class _StageView(torch.nn.Module):
    """Another way to call a stage's module, with the same parameters under the same names.

    Its children are the module's own, in the same dictionaries, so that checkpoints, ``to`` and data parallelism see
    no difference.
    """

    traced_module: torch.nn.Module

    def __init__(self, module: torch.nn.Module, wiring: StageWiring) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        # Not as a child, which would put a prefix before every name.
        object.__setattr__(self, "traced_module", module)
        self.wiring = wiring

    def train(self, mode: bool = True) -> _StageView:
        self.traced_module.train(mode)
        self.training = mode
        return self


class _SendsRootInputs(_StageView):
    """Stage 0, with the root inputs that later stages use as further outputs."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        topology = self.wiring.topology
        given = _by_root(topology.roots, args, kwargs)
        own = [source.root for source in self.wiring.inputs]
        if len(own) == len(topology.roots) or len(args) + len(kwargs) == len(own):
            # Either the module takes what the model takes, or the program gives what the module takes.
            output = self.traced_module(*args, **kwargs)
            if len(own) != len(topology.roots):
                given = _by_root([root for root in own if root is not None], args, kwargs)
        else:
            output = self.traced_module(*(_given(given, root, "the first stage") for root in own))
        outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        nothing = torch.empty(_ABSENT)
        return outputs[: topology.first_outputs] + tuple(given.get(root, nothing) for root in topology.forwarded)


class _TakesRootInputs(_StageView):
    """A later stage that uses root inputs: those that stage 0 sent, or those given here as keyword arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = list(args)
        for position, source in enumerate(self.wiring.inputs):
            if source.root is None:
                continue
            if source.root in kwargs:
                values[position] = kwargs.pop(source.root)
            elif tuple(values[position].shape) == _ABSENT:
                _given({}, source.root, f"stage {self.wiring.stage_index}")
        return self.traced_module(*values, **kwargs)


def _by_root(roots: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs by the names that the tracer gave them: leaves of containers have names of their own."""
    given = dict(zip(roots, tree_leaves(tuple(args)), strict=False))
    for name, value in kwargs.items():
        leaves = tree_leaves(value)
        names = [name] if name in roots else [root for root in roots if root.startswith(f"{name}_")]
        given.update(zip(names, leaves, strict=False))
    return given


def _given(given: dict[str, Any], root: str | None, user: str) -> Any:
    if root is None or root not in given:
        raise PipelineUsageError(
            f"{user} uses the model's input '{root}', which was not given: pass it to step() on the rank of the first "
            "stage, where all inputs of the model go"
        )
    return given[root]
