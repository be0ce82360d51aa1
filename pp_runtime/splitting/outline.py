"""A stage's graph with the calls of the model's modules in it, as far as each is there in one piece.

    linear, relu, linear, add, linear ──► layers.0(x), add, head(x)

So hooks, FSDP on single layers and checkpoint wrappers find modules to go around, as they do in the model. A module
that is called twice in a stage, or whose parameters others read, has its nodes in the module around it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import fx

from pp_runtime.splitting.in_place import attribute

MakeModule = Callable[[torch.nn.Module, fx.Graph], fx.GraphModule]
"""Makes a module of a graph and of what it reads."""


def outline(root: torch.nn.Module, graph: fx.Graph, make_module: MakeModule) -> fx.Graph:
    """The graph with calls of modules, which are put in ``root`` in place of those that only hold their state."""
    if any(node.op == "call_module" for node in graph.nodes):
        return graph  # not as the tracer leaves it
    computing = [node for node in graph.nodes if node.op == "call_function"]
    outliner = _Outliner(root, make_module, _module_calls(graph, computing))
    result = fx.Graph()
    inputs = {node: _copy(result, node) for node in graph.nodes if node.op == "placeholder"}
    level = _Level("", result, inputs, root, root)
    outliner.emit(level, computing)
    (output,) = (node for node in graph.nodes if node.op == "output")
    result.node_copy(output, level.resolve)
    result.set_codegen(graph._codegen)
    result.lint()
    return result


def _module_calls(graph: fx.Graph, computing: Sequence[fx.Node]) -> dict[fx.Node, list[str]]:
    """Of every node the modules that it is in, outermost first, as far as they can be outlined."""
    calls: dict[fx.Node, dict[str, str]] = {}  # node -> path -> which call
    stack: dict[str, str] = {}
    for node in computing:
        if traced := node.meta.get("nn_module_stack"):
            stack = {path: str(call) for call, (path, _) in traced.items() if path}
        calls[node] = stack  # a node without one, such as a part of a tuple, is where the one before it is
    places: dict[str, list[int]] = {}
    names: dict[str, set[str]] = {}
    for place, node in enumerate(computing):
        for path, call in calls[node].items():
            places.setdefault(path, []).append(place)
            names.setdefault(path, set()).add(call)
    whole = {
        path
        for path, where in places.items()
        if where[-1] - where[0] + 1 == len(where) and len(names[path]) == 1 and "@" not in path
    }
    for node in graph.nodes:
        if node.op == "get_attr":
            owners = {path for path in whole if str(node.target).startswith(f"{path}.")}
            whole -= {path for path in owners if any(path not in calls.get(user, ()) for user in node.users)}
    return {node: _nested([path for path in calls[node] if path in whole]) for node in computing}


def _nested(paths: Iterable[str]) -> list[str]:
    found = [""]
    for path in paths:
        if path.startswith(f"{found[-1]}." if found[-1] else ""):
            found.append(path)
    return found[1:]


class _Level:
    """The graph of one module while it is made."""

    def __init__(
        self, path: str, graph: fx.Graph, made: dict[fx.Node, fx.Node], state: torch.nn.Module, root: torch.nn.Module
    ) -> None:
        self.path, self.graph, self.made, self.state, self._root = path, graph, made, state, root

    def resolve(self, node: fx.Node) -> fx.Node:
        """What a node of the whole graph is in this one."""
        if node not in self.made:
            if node.op != "get_attr":
                raise AssertionError(f"{node} is used in '{self.path}' before it is made")
            name = str(node.target)
            if _is_region(self._root, node) and self.path:
                setattr(self.state, name, attribute(self._root, name))  # torch.no_grad() and the like have no module
                self.made[node] = self.graph.get_attr(name)
            else:
                self.made[node] = self.graph.get_attr(self.within(name))
            self.made[node].meta = dict(node.meta)
        return self.made[node]

    def within(self, path: str) -> str:
        """A dotted name as this module has it."""
        return path[len(self.path) + 1 :] if self.path else path


class _Outliner:
    def __init__(self, root: torch.nn.Module, make_module: MakeModule, paths: dict[fx.Node, list[str]]) -> None:
        self._root, self._make, self._paths = root, make_module, paths

    def emit(self, level: _Level, nodes: Sequence[fx.Node]) -> None:
        """Write nodes into a module's graph, those of modules in it as calls of them."""
        place = 0
        while place < len(nodes):
            child = self._child(nodes[place], level.path)
            end = place + 1
            if child is None:
                level.made[nodes[place]] = level.graph.node_copy(nodes[place], level.resolve)
            else:
                while end < len(nodes) and child in self._paths[nodes[end]]:
                    end += 1
                self._call(level, child, nodes[place:end])
            place = end

    def _child(self, node: fx.Node, path: str) -> str | None:
        return next((inner for inner in self._paths[node] if len(inner) > len(path)), None)

    def _call(self, level: _Level, path: str, nodes: Sequence[fx.Node]) -> None:
        inside = set(nodes)
        used = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
        inputs = [node for node in used if not self._belongs(node, path)]
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        graph = fx.Graph()
        made = {node: _copy(graph, node, placeholder=True) for node in inputs}
        inner = _Level(path, graph, made, self._holder(path), self._root)
        self.emit(inner, nodes)
        results = [inner.made[node] for node in outputs]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        graph.lint()
        parent, _, name = path.rpartition(".")
        self._holder(parent).add_module(name, self._make(inner.state, graph))
        arguments = tuple(level.resolve(node) for node in inputs)
        # Named, since a module may be called self, as BERT's attention is, and the result would hide the module.
        call = level.graph.create_node("call_module", level.within(path), arguments, name=f"{name}_result")
        for position, node in enumerate(outputs):
            result = call if len(outputs) == 1 else level.graph.call_function(operator.getitem, (call, position))
            result.meta = dict(node.meta)
            level.made[node] = result

    def _belongs(self, node: fx.Node, path: str) -> bool:
        """Whether a module reads this itself, and is not given it."""
        return node.op == "get_attr" and (str(node.target).startswith(f"{path}.") or _is_region(self._root, node))

    def _holder(self, path: str) -> torch.nn.Module:
        """What holds a module's state, and modules in it; made where there is none."""
        module = self._root
        for part in path.split(".") if path else ():
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        return module


def _is_region(root: torch.nn.Module, node: fx.Node) -> bool:
    """Whether a node reads the graph of a region that the tracer keeps whole."""
    return node.op == "get_attr" and isinstance(attribute(root, str(node.target)), fx.GraphModule)


def _copy(graph: fx.Graph, node: fx.Node, placeholder: bool = False) -> fx.Node:
    made = graph.placeholder(node.name if placeholder else str(node.target))
    made.meta = dict(node.meta)
    return made
