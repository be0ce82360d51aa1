"""Changes in place in a traced graph that a split would lose.

    stage 0: h = f(x) ──► stage 1: h.relu_() ──► ...
                   └────────────────────────────► stage 2: g(h)     the plain model gives g the changed h

Each stage has its own copy of what it receives, and of a buffer, so a change is seen by the stage that makes it alone.
Where another would have to see it, the split is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from pp_runtime.errors import PipelineUsageError

# Marked as a change, though no number changes.
_HARMLESS = frozenset({"aten::detach_"})
# Of these the schema does not say that they update the running statistics.
_UPDATING = {"aten::batch_norm": (3, 4), "aten::instance_norm": (3, 4)}


def check_changes_in_place(graph: fx.Graph, stage_of: Mapping[fx.Node, int]) -> frozenset[fx.Node]:
    """Raise PipelineUsageError where a stage changes a tensor that another stage uses afterwards, or a state of both.

    Returns the values that are a changed state itself: the next microbatch changes it again, so a copy must be sent.
    """
    passing: set[fx.Node] = set()
    order = {node: place for place, node in enumerate(graph.nodes)}
    sharing: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        sharing.setdefault(_storage(node), []).append(node)
    for node in graph.nodes:
        for changed in _changed(node):
            key = _storage(changed)
            same = [changed] if key is None else sharing[key]
            if any(other.op == "get_attr" for other in same):
                passing.update(same)
            for other in same:
                _check(other, node, order, stage_of)
            _check_one_copy(same, node, stage_of)
    return frozenset(passing)


def _check(other: fx.Node, change: fx.Node, order: Mapping[fx.Node, int], stage_of: Mapping[fx.Node, int]) -> None:
    stage = stage_of[change]
    if other.op != "get_attr" and stage_of.get(other, -1) >= stage:
        return  # this stage made it, and sends it on as it is at the end
    for user in other.users:
        seen = other.op == "get_attr" or order[user] > order[change]
        if seen and stage_of.get(user, stage) != stage:
            raise PipelineUsageError(
                f"stage {stage} changes '{other.target if other.op == 'get_attr' else other.name}' in place "
                f"({change.target}), which stage {stage_of[user]} uses too: split the model where one stage has both, "
                "or change a copy"
            )


def _check_one_copy(same: list[fx.Node], change: fx.Node, stage_of: Mapping[fx.Node, int]) -> None:
    """Two views that a stage receives are two tensors there, of which a change reaches one."""
    stage = stage_of[change]
    received = [
        node
        for node in same
        if stage_of.get(node, -1) < stage and any(stage_of.get(user) == stage for user in node.users)
    ]
    states = {node.target for node in received if node.op == "get_attr"}
    tensors = [node for node in received if node.op != "get_attr"]
    if len(tensors) > 1 or (tensors and states):
        raise PipelineUsageError(
            f"stage {stage} changes '{tensors[0].name}' in place ({change.target}) and uses other views of it that it "
            "receives separately: split the model at another place, or change a copy"
        )


def _changed(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a node changes in place."""
    if node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None or isinstance(node.target, torch._ops.HigherOrderOperator):
        if any(_changes_its_inputs(part) for part in _graph_modules(node)):
            yield from (value for value in node.all_input_nodes if isinstance(value.meta.get("val"), torch.Tensor))
        return
    if schema.name in _HARMLESS:
        return
    for place, argument in enumerate(schema.arguments):
        changes = argument.alias_info is not None and argument.alias_info.is_write
        if not changes and place not in _UPDATING.get(schema.name, ()):
            continue
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        yield from (found for found in _nodes_in(value))


def _changes_its_inputs(module: fx.GraphModule) -> bool:
    inputs = {_storage(node) for node in module.graph.nodes if node.op == "placeholder"} - {None}
    changed = [value for node in module.graph.nodes for value in _changed(node)]
    return any(value.op == "placeholder" or _storage(value) in inputs for value in changed)


def _graph_modules(node: fx.Node) -> Iterator[fx.GraphModule]:
    owner = node.graph.owning_module
    for value in node.all_input_nodes:
        if value.op == "get_attr" and owner is not None:
            found = attribute(owner, str(value.target))
            if isinstance(found, fx.GraphModule):
                yield found


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What a dotted name stands for in a module."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _nodes_in(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _nodes_in(part)


def _storage(node: fx.Node) -> Any:
    """What nodes that share memory have in common; None where it is unknown."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value.untyped_storage()._cdata
    return None
