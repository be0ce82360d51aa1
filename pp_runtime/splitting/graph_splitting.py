"""An exported graph cut into stages, at the ``pipe_split`` calls in it.

    x ── embedding ── split ── layer ── split ── layer ── head ──►
         ╰─ submod_pp_0 ─╯   ╰ submod_pp_1 ╯   ╰─ submod_pp_2 ─╯     one module that calls the three

A stage has the nodes between two splits. What it uses of another stage comes in as an input, from there and not by way
of the stages between. What it uses of the model's own inputs comes by way of stage 0, which sends them on. Parameters,
buffers and constants are the stage's own, under the names that they have in the model.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.in_place import attribute, check_changes_in_place
from pp_runtime.splitting.stage_module import Binding, BindsInputs, StageModule, stage_module
from pp_runtime.splitting.traced_inputs import FirstStageInputs, LaterStageInputs, ModelInputs
from pp_runtime.splitting.traced_state import TiedParameters, TracedState


@dataclass(frozen=True)
class SplitModel:
    """The stages of a traced model, as the modules ``submod_pp_0``, ... of ``graph_module``."""

    graph_module: fx.GraphModule
    num_stages: int
    split_points: int  # in the graph; several may fall together, or stand before or after everything
    tied: TiedParameters


def stage_name(index: int) -> str:
    """What the module of a stage is called in the split one."""
    return f"submod_pp_{index}"


def split_graph(
    traced: fx.GraphModule, model: torch.nn.Module, inputs: ModelInputs, temporary: Iterable[str], is_split: Callable
) -> SplitModel:
    """Cut a traced model at its split points.

    ``temporary`` are the names of the buffers that a state dict leaves out. Raises PipelineUsageError where a part
    between two split points would give other numbers than in the model.
    """
    stage_of = _stages_of_nodes(traced, is_split)
    passing = check_changes_in_place(traced.graph, stage_of)
    num_stages = max(stage_of.values()) + 1
    parts = [_Part(index) for index in range(num_stages)]
    for node in traced.graph.nodes:
        if node in stage_of:
            parts[stage_of[node]].nodes.append(node)
    _connect(parts, stage_of, inputs)
    states = TracedState(traced, model, frozenset(temporary))
    modules = {
        stage_name(part.index): part.module(states, _binding(part, inputs), passing, is_last=part is parts[-1])
        for part in parts
    }
    for module in modules.values():
        module.traced_in(model.training)
    tied = states.tied(list(modules.values()))
    split_points = sum(map(is_split, traced.graph.nodes))
    return SplitModel(fx.GraphModule(modules, _outer_graph(traced.graph, parts)), num_stages, split_points, tied)


def _stages_of_nodes(traced: fx.GraphModule, is_split: Callable[[fx.Node], bool]) -> dict[fx.Node, int]:
    """The stage of every node that computes something, and of the output."""
    stage_of: dict[fx.Node, int] = {}
    writes: list[fx.Node] = []
    stage, empty = 0, True
    for node in traced.graph.nodes:
        if is_split(node):
            stage, empty = stage + (not empty), True
        elif node.op in ("placeholder", "get_attr"):
            _check_no_split_inside(traced, node, is_split)
        elif _writes_state(node):
            writes.append(node)
        elif node.op == "output":
            stage_of[node] = stage - (empty and stage > 0)
        else:
            source = node.args[0] if node.target is operator.getitem else None
            stage_of[node] = stage_of[source] if isinstance(source, fx.Node) and source in stage_of else stage
            empty = empty and stage_of[node] != stage
    for node in writes:
        stage_of[node] = _stage_of_write(node, stage_of)
    return stage_of


def _check_no_split_inside(traced: fx.GraphModule, node: fx.Node, is_split: Callable[[fx.Node], bool]) -> None:
    inner = attribute(traced, str(node.target)) if node.op == "get_attr" else None
    if isinstance(inner, fx.GraphModule):
        if any(is_split(part) for part in inner.graph.nodes):
            raise PipelineUsageError(
                "a split point is inside a region that the tracer keeps whole, such as torch.no_grad(), autocast or a "
                "checkpointed block: split before or after it"
            )
        for part in inner.graph.nodes:
            _check_no_split_inside(inner, part, is_split)


def _writes_state(node: fx.Node) -> bool:
    """Whether this is one of the assignments to buffers that the tracer puts behind everything else."""
    target = node.args[0] if node.target is torch.ops.aten.copy_.default else None
    return isinstance(target, fx.Node) and target.op == "get_attr" and not node.users


def _stage_of_write(node: fx.Node, stage_of: Mapping[fx.Node, int]) -> int:
    """A buffer is assigned where it is read, or where its new value is made."""
    buffer, value = node.args[:2]
    made = max((stage_of.get(source, 0) for source in node.all_input_nodes if source is not buffer), default=0)
    read = {stage_of[user] for user in buffer.users if user in stage_of}  # type: ignore[union-attr]
    return max(read | {made}) if len(read) == 1 else made


@dataclass
class _Part:
    """A stage while it is made: its nodes, and what goes in and out."""

    index: int
    nodes: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)  # inputs that other stages make
    roots: list[str] = field(default_factory=list)  # inputs that are the model's
    outputs: list[fx.Node] = field(default_factory=list)
    forwarded: list[str] = field(default_factory=list)  # stage 0: inputs of the model that others use
    uses: frozenset[str] = frozenset()

    def module(
        self, states: TracedState, binding: Binding, passing: frozenset[fx.Node], *, is_last: bool
    ) -> StageModule:
        """The stage as a module of its own; of ``passing`` values it gives copies."""
        graph = fx.Graph()
        graph.set_codegen(BindsInputs(binding))
        made: dict[fx.Node, fx.Node] = {}
        roots: dict[str, fx.Node] = {}
        for value in self.values:
            made[value] = graph.placeholder(value.name)
            made[value].meta = copy.copy(value.meta)
        for root in self.roots:
            roots[root] = graph.placeholder(root)
        root_module = torch.nn.Module()

        def own(user: fx.Node, node: fx.Node) -> fx.Node:
            if node.op == "placeholder":
                return roots[str(node.target)]
            return states.fetch(graph, root_module, self.index, node, user) if node.op == "get_attr" else made[node]

        def emit(nodes: Iterable[fx.Node]) -> None:
            for node in nodes:
                if node.op == "call_module":
                    states.put_module(root_module, str(node.target))
                made[node] = graph.node_copy(node, lambda argument, user=node: own(user, argument))  # type: ignore[misc]

        emit(node for node in self.nodes if node.op != "output" and not _writes_state(node))
        if is_last:
            output = self.nodes[-1]
            returned = [node for node in _results(output) if isinstance(node, fx.Node)]
            results = [own(output, node) for node in returned]
        else:
            returned = self.outputs
            results = [made[node] for node in returned] + [roots[root] for root in self.forwarded]
        for place, node in enumerate(returned):
            if node in passing:
                results[place] = graph.call_function(torch.ops.aten.clone.default, (results[place],))
        emit(filter(_writes_state, self.nodes))  # behind the copies, which are of the state as the stage read it
        graph.output(results[0] if len(results) == 1 else tuple(results))
        graph.lint()
        return stage_module(root_module, graph, states.temporary)


def _connect(parts: list[_Part], stage_of: Mapping[fx.Node, int], inputs: ModelInputs) -> None:
    """Find what each stage takes and gives."""
    used: list[set[str]] = []
    for part in parts:
        sources = list(dict.fromkeys(source for node in part.nodes for source in node.all_input_nodes))
        made = [node for node in sources if node.op not in ("placeholder", "get_attr")]
        part.values = [node for node in made if stage_of[node] != part.index]
        for value in part.values:
            _check_value(value, stage_of[value], part.index)
            producer = parts[stage_of[value]]
            if value not in producer.outputs:
                producer.outputs.append(value)
        used.append({str(node.target) for node in sources if node.op == "placeholder"})
    order = inputs.in_order()
    for part, names in zip(parts, used, strict=True):
        part.roots = [name for name in order if name in names]
    first = parts[0]
    first.uses = frozenset(used[0])
    wanted = set().union(*used[1:]) if len(parts) > 1 else set()
    first.forwarded = [name for name in order if name in wanted]
    first.roots = [name for name in order if name in first.uses | wanted]


def _check_value(value: fx.Node, source: int, destination: int) -> None:
    if destination < source:
        raise PipelineUsageError(
            f"stage {destination} assigns '{value.name}', which stage {source} makes, to a buffer that it reads: "
            "split the model where one stage has both"
        )
    if not isinstance(value.meta.get("val", torch.empty(0)), torch.Tensor):
        raise PipelineUsageError(
            f"stage {destination} uses '{value.name}' of stage {source}, which is not a tensor but "
            f"{value.meta['val']!r}: split the model at another place"
        )


def _binding(part: _Part, inputs: ModelInputs) -> Binding:
    if part.index == 0:
        return FirstStageInputs(inputs, tuple(part.roots), part.uses)
    first = len(part.values)
    roots = tuple((first + place, root) for place, root in enumerate(part.roots))
    return LaterStageInputs(inputs, part.index, first + len(roots), roots)


def _results(output: fx.Node) -> list[Any]:
    """The leaves that a graph returns."""
    returned = output.args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _outer_graph(traced: fx.Graph, parts: Sequence[_Part]) -> fx.Graph:
    """The graph that calls the stages one after the other."""
    graph = fx.Graph()
    values: dict[fx.Node | str, fx.Node] = {}
    for node in traced.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(str(node.target))
    roots = {str(node.target): value for node, value in values.items() if isinstance(node, fx.Node)}
    for part in parts:
        arguments = [values[value] for value in part.values]
        # From stage 1 on, the model's inputs are outputs of stage 0.
        arguments += [roots[root] if part.index == 0 else values[root] for root in part.roots]
        call = graph.call_module(stage_name(part.index), tuple(arguments))
        call.meta["stage_idx"] = part.index
        results: list[fx.Node | str] = [*part.outputs, *part.forwarded]
        if part is parts[-1]:
            results = [leaf for leaf in _results(part.nodes[-1]) if isinstance(leaf, fx.Node)]
        for place, result in enumerate(results):
            values[result] = call if len(results) == 1 else graph.call_function(operator.getitem, (call, place))
    returned = tuple(values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in _results(parts[-1].nodes[-1]))
    graph.output(returned)
    graph.lint()
    return graph
