"""Cuts the graph of a compiled backward in two: input gradients (dI) and weight gradients (dW).

    arguments ──► dI ──► input gradients
        │         │ kept values
        └───────► dW ──► weight gradients

Every product (matrix product, convolution) runs once: in dI where an input gradient needs it, in dW otherwise. What
lies between is placed so that the least memory lives from dI to dW, arguments that dW reads included: the least cut
between what is there after dI and what dW's products read, in a network in which keeping a value costs its size. On the
way a value may be computed anew in dW, where that is cheap, or a small weight gradient (a bias's, a norm's) be computed
in dI, where that keeps less. Both cost a little in the network, so they happen only where they save memory.

The network is that of min-cut rematerialisation (torch's own partitioner cuts the joint graph with one), here on the
backward graph and with a third choice.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import networkx
import torch
from torch import fx

from pp_runtime.running.compiled import operations

RUN_COST = 1 / 64
"""Of computing a byte of a cheap value on the less wanted side, in bytes kept."""

_AFTER_I, _IN_W = "there after I", "read in W"


class CannotCut(Exception):
    """Why a graph stays whole, as a phrase."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The two graphs, and how their arguments and results belong to the whole graph's.

    ``input_half`` takes the whole graph's arguments ``input_arguments`` and returns its results ``input_results``, then
    the kept values, of which those for ``ready_results`` (weight gradients that I has at hand) come first.
    ``weight_half`` takes the whole graph's arguments ``weight_arguments``, then the other kept values, and returns the
    results ``weight_results``.
    """

    input_half: fx.GraphModule
    weight_half: fx.GraphModule
    input_arguments: tuple[int, ...]
    weight_arguments: tuple[int, ...]
    input_results: tuple[int, ...]
    ready_results: tuple[int, ...]
    weight_results: tuple[int, ...]
    kept_bytes: float
    """By torch's size hints: kept values and arguments that only W still reads; parameters not counted."""


def cut(whole: fx.GraphModule, weight_results: Collection[int], free_arguments: Collection[int] = ()) -> Cut:
    """Cut a backward graph by which of its results are weight gradients.

    ``free_arguments`` are those that live anyway, as parameters do. Raises CannotCut.
    """
    graph = _with_layers_split(whole, weight_results)
    nodes = list(graph.nodes)
    for node in nodes:
        if (objection := operations.objection_to(node)) is not None:
            raise CannotCut(objection)
    placeholders = graph.find_nodes(op="placeholder")
    results = _gradients(graph)
    of_inputs = [i for i, node in enumerate(results) if node is not None and i not in weight_results]
    of_weights = [i for i, node in enumerate(results) if node is not None and i in weight_results]
    input_side = _ancestors(results[i] for i in of_inputs)
    needed = _ancestors(results[i] for i in of_weights) | input_side
    free = {placeholders[i] for i in free_arguments}
    partition = _Partition([node for node in nodes if node in needed], input_side, free)
    if not partition.products_of_w:
        raise CannotCut("its weight gradients take no product")
    kept, in_weight_half = partition.least([results[i] for i in of_weights])

    ready = [i for i in of_weights if results[i] not in in_weight_half]
    computed = [i for i in of_weights if results[i] in in_weight_half]
    kept_values = [node for node in nodes if node in kept and node.op != "placeholder"]
    read_by_w = {argument for node in in_weight_half for argument in node.all_input_nodes}
    passed_on = [node for node in kept_values if node in read_by_w]
    input_half, input_arguments = _extract(
        whole, graph, placeholders, [results[i] for i in (*of_inputs, *ready)] + passed_on, given=()
    )
    weight_half, weight_arguments = _extract(
        whole, graph, placeholders, [results[i] for i in computed], given=passed_on
    )
    return Cut(
        input_half,
        weight_half,
        input_arguments,
        weight_arguments,
        tuple(of_inputs),
        tuple(ready),
        tuple(computed),
        sum(operations.bytes_of(node) for node in kept if node not in free),
    )


def results_of(graph: fx.Graph) -> list[object]:
    """What the graph returns: nodes, None where there is no gradient, numbers that torch knows."""
    results = graph.output_node().args[0]
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _gradients(graph: fx.Graph) -> list[fx.Node | None]:
    """The results that are tensors; None in place of all others."""
    return [one if isinstance(one, fx.Node) and operations.is_tensor(one) else None for one in results_of(graph)]


def _ancestors(nodes: Iterable[fx.Node | None], given: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and all that they read, directly or not; of what is given not what that was made of."""
    to_visit = [node for node in nodes if node is not None]
    found = set(to_visit)
    while to_visit:
        if (node := to_visit.pop()) not in given:
            new = [argument for argument in node.all_input_nodes if argument not in found]
            found.update(new)
            to_visit.extend(new)
    return found


def _with_layers_split(whole: fx.GraphModule, weight_results: Collection[int]) -> fx.Graph:
    """A copy in which a layer's backward that makes input and weight gradients at once stands twice, once for each."""
    graph = copied(whole).graph
    results = _gradients(graph)
    input_side = _ancestors(results[i] for i in range(len(results)) if i not in weight_results)
    for node in list(graph.nodes):
        if operations.name_of(node) not in ("aten::convolution_backward", "aten::linear_backward"):
            continue
        parts = [user for user in node.users if user.target is operator.getitem]
        of_inputs = [part.args[1] for part in parts if part in input_side]
        of_weights = [part.args[1] for part in parts if part not in input_side]
        if len(parts) == len(node.users) and of_inputs and of_weights:
            with graph.inserting_before(node):
                twin = graph.node_copy(node)
            _mask(node, of_inputs)
            _mask(twin, of_weights)
            for part in parts:
                if part not in input_side:
                    part.replace_input_with(node, twin)
    graph.lint()
    return graph


def _mask(layer: fx.Node, wanted: Sequence[object]) -> None:
    """Have a layer's backward make only these of its results; its last argument says which it makes."""
    assert isinstance(layer.target, torch._ops.OpOverload)
    names = [argument.name for argument in layer.target._schema.arguments]
    at = names.index("output_mask")
    mask = [bool(made) and i in wanted for i, made in enumerate(cast(Sequence[object], layer.args[at]))]
    layer.update_arg(at, mask)
    layer.meta = dict(layer.meta)
    if isinstance(values := layer.meta.get("val"), (tuple, list)):
        layer.meta["val"] = tuple(value if i in wanted else None for i, value in enumerate(values))


class _Partition:
    """Which half computes what. Every node is two points of a network: before and after it is kept."""

    def __init__(self, nodes: Sequence[fx.Node], input_side: Collection[fx.Node], free: Collection[fx.Node]) -> None:
        self._nodes = nodes
        self._input_side = input_side
        self._free = free
        self.products_of_w = [node for node in nodes if node not in input_side and operations.is_product(node)]
        # What a product of W goes into is made in W too.
        self._of_w = set(self.products_of_w)
        for node in nodes:
            if not self._of_w.isdisjoint(node.all_input_nodes):
                self._of_w.add(node)

    def least(self, results: Sequence[fx.Node | None]) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes whose values are kept, and those that the weight half computes."""
        network = networkx.DiGraph()
        for node in self._nodes:
            self._add(network, node)
        for result in results:
            if result not in self._of_w:
                network.add_edge((result, True), _IN_W)  # no capacity: infinite
        try:
            _, (after_i, _) = networkx.minimum_cut(network, _AFTER_I, _IN_W)
        except networkx.NetworkXUnbounded:
            raise CannotCut("its weight gradients read what cannot be kept") from None
        kept = {node for node in self._nodes if (node, False) in after_i and (node, True) not in after_i}
        used = _ancestors(results, given=kept)
        return kept & used, {node for node in used if node not in kept and node.op != "placeholder"}

    def _add(self, network: networkx.DiGraph, node: fx.Node) -> None:
        if node in self._of_w:
            for argument in node.all_input_nodes:
                if argument not in self._of_w:
                    network.add_edge((argument, True), _IN_W)
            return
        before, after = (node, False), (node, True)
        size = operations.bytes_of(node)
        if node.op == "placeholder":
            free = node in self._free or operations.is_number(node) or size == math.inf
        else:
            free = node.op == "get_attr"
        if free:
            network.add_edge(before, after, capacity=0)
        elif size < math.inf and not (node.op != "placeholder" and operations.is_view(node)):
            network.add_edge(before, after, capacity=size)
        else:  # a view keeps what it looks at, so that is kept instead
            network.add_edge(before, after)
        run_cost = RUN_COST * size if 8 < size < math.inf and not operations.is_view(node) else 0.0
        if node.op == "placeholder" or node.op == "get_attr":
            network.add_edge(_AFTER_I, before)
        elif node in self._input_side:
            if operations.may_run_twice(node):
                network.add_edge(_AFTER_I, before, capacity=run_cost)
            else:
                network.add_edge(_AFTER_I, before)
        else:
            network.add_edge(before, _IN_W, capacity=run_cost)
            # Computed in I, it has all that it reads computed there.
            for argument in node.all_input_nodes:
                network.add_edge(before, (argument, False))
        for argument in node.all_input_nodes:
            network.add_edge((argument, True), before)


def _extract(
    whole: fx.GraphModule,
    graph: fx.Graph,
    placeholders: Sequence[fx.Node],
    results: Sequence[fx.Node | None],
    given: Sequence[fx.Node],
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The part of the graph that computes the results from arguments and given values.

    Returns it with the numbers of the arguments that it takes; given values come after those.
    """
    needed = _ancestors(results, set(given))
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    arguments = tuple(i for i, node in enumerate(placeholders) if node in needed and node not in given)
    # Inductor's cache goes by the graph's text, and not by which arguments a backward may overwrite; names of our own
    # keep a half, none of whose arguments it may, from being taken for a backward of torch's.
    for node in [*(placeholders[i] for i in arguments), *given]:
        copies[node] = part.placeholder(f"half_{node.name}")
        copies[node].meta = dict(node.meta)
    for node in graph.nodes:
        if node in needed and node not in copies and node.op != "output":
            copies[node] = part.node_copy(node, copies.__getitem__)
    output = part.output(tuple(None if node is None else copies[node] for node in results))
    output.meta["user_visible_output_idxs"] = list(range(len(results)))
    return _module(whole, part), arguments


def _module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """With graphs of its own for the operators that run one: a compiler may change them."""
    module = fx.GraphModule(root, graph)
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(inner := getattr(module, node.target, None), fx.GraphModule):
            setattr(module, node.target, copied(inner))
    return module


def copied(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.output_node().meta.update(module.graph.output_node().meta)
    return _module(module, graph)
