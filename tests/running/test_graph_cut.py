"""The cut of a backward graph: both halves give the whole's results, and no other cut keeps less."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from pp_runtime.running.compiled.graph_cut import RUN_COST, CannotCut, Cut, cut
from pp_runtime.running.compiled.operations import bytes_of, draws_random_numbers, is_view, may_run_twice
from tests.helpers import api

pytestmark = api.ours_only("has no cut")

aten = torch.ops.aten
SIZE = 3


@dataclass
class Drawn:
    graph: fx.GraphModule
    inputs: list[torch.Tensor]
    weight_results: set[int]
    free: set[int]
    nodes: list[fx.Node] = field(default_factory=list)


@st.composite
def graphs(draw: st.DrawFn) -> Drawn:
    """Squares and rows: products, elementwise operations, sums to a row and views of it, results of both kinds."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def add(node: fx.Node, rows: int) -> None:
        node.meta["val"] = torch.empty(rows, SIZE, dtype=torch.float64, device="meta")
        nodes.append(node)

    count = draw(st.integers(2, 4))
    for number in range(count):
        add(graph.placeholder(f"argument_{number}"), SIZE)
    for _ in range(draw(st.integers(2, 8))):
        one, other = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        rows = [int(node.meta["val"].shape[0]) for node in (one, other)]
        kind = draw(st.sampled_from(["mm", "mm", "sin", "add", "sum", "expand", "cumsum"]))
        if kind == "mm" and rows[1] == SIZE:
            add(graph.call_function(aten.mm.default, (one, other)), rows[0])
        elif kind == "add":
            add(graph.call_function(aten.add.Tensor, (one, other)), max(rows))
        elif kind == "sum":
            add(graph.call_function(aten.sum.dim_IntList, (one, [0], True)), 1)
        elif kind == "expand" and rows[0] == 1:
            add(graph.call_function(aten.expand.default, (one, [SIZE, SIZE])), SIZE)
        elif kind == "cumsum":
            add(graph.call_function(aten.cumsum.default, (one, 0)), rows[0])
        else:
            add(graph.call_function(aten.sin.default, (one,)), rows[0])
    results = draw(st.lists(st.sampled_from(nodes), min_size=2, max_size=5))
    weights = draw(st.sets(st.sampled_from(range(len(results))), min_size=1, max_size=len(results) - 1))
    free = draw(st.sets(st.sampled_from(range(count)), max_size=1))
    graph.output(tuple(results))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in range(count)]
    return Drawn(fx.GraphModule(torch.nn.Module(), graph), inputs, weights, free, nodes)


def run_halves(made: Cut, inputs: list[torch.Tensor], count: int) -> list[Any]:
    results: list[Any] = [None] * count
    found = made.input_half(*(inputs[i] for i in made.input_arguments))
    at_hand = (*made.input_results, *made.ready_results)
    for i, result in zip(at_hand, found, strict=False):
        results[i] = result
    kept = found[len(at_hand) :]
    of_w = made.weight_half(*(inputs[i] for i in made.weight_arguments), *kept)
    for i, result in zip(made.weight_results, of_w, strict=True):
        results[i] = result
    return results


def ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found, to_visit = set(nodes), list(nodes)
    while to_visit:
        new = [node for node in to_visit.pop().all_input_nodes if node not in found]
        found.update(new)
        to_visit.extend(new)
    return found


def least_kept(drawn: Drawn) -> float:
    """The least bytes with which W can do its part, over all choices of what is kept."""
    results = list(drawn.graph.graph.output_node().args[0])  # type: ignore[arg-type]
    input_side = ancestors([node for i, node in enumerate(results) if i not in drawn.weight_results])
    wanted = [node for i, node in enumerate(results) if i in drawn.weight_results]
    arguments = [node for node in drawn.nodes if node.op == "placeholder"]
    free = {arguments[i] for i in drawn.free}
    of_w = set[fx.Node]()
    for node in drawn.nodes:
        is_product = node.target is aten.mm.default and node not in input_side and node in ancestors(wanted)
        if is_product or of_w.intersection(node.all_input_nodes):
            of_w.add(node)
    may_keep = [node for node in drawn.nodes if node not in of_w | free and not is_view(node)]

    def reaches(kept: set[fx.Node]) -> bool:
        there = set(free) | kept
        for node in drawn.nodes:
            may_run = node.op != "placeholder" and (node not in input_side or may_run_twice(node))
            if may_run and there.issuperset(node.all_input_nodes):
                there.add(node)
        return there.issuperset(wanted)

    subsets = (set(chosen) for size in range(len(may_keep) + 1) for chosen in itertools.combinations(may_keep, size))
    return min(sum(map(bytes_of, kept)) for kept in subsets if reaches(kept))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_the_halves_give_the_results_and_no_cut_keeps_less(drawn: Drawn) -> None:
    expected = drawn.graph(*drawn.inputs)
    try:
        made = cut(drawn.graph, drawn.weight_results, drawn.free)
    except CannotCut as objection:
        assert "take no product" in str(objection)
        return
    for got, wanted in zip(run_halves(made, drawn.inputs, len(expected)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    products = [
        sum(node.target is aten.mm.default for node in half.graph.nodes) for half in (made.input_half, made.weight_half)
    ]
    results = list(drawn.graph.graph.output_node().args[0])  # type: ignore[arg-type]
    needed = ancestors(results)
    input_side = ancestors([node for i, node in enumerate(results) if i not in drawn.weight_results])
    of_inputs = sum(node.target is aten.mm.default for node in input_side)
    assert products == [of_inputs, sum(node.target is aten.mm.default for node in needed) - of_inputs]
    slack = RUN_COST * sum(map(bytes_of, drawn.nodes))
    assert made.kept_bytes <= least_kept(drawn) + slack


def graph_of(build: Any) -> fx.GraphModule:
    graph = fx.Graph()
    build(graph)
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("target", "words"),
    [(aten.add_.Tensor, "writes into its arguments"), (aten.rand_like.default, "draws random numbers")],
)
def test_what_cannot_be_cut_is_said(target: Any, words: str) -> None:
    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(SIZE, SIZE, device="meta")
        y = graph.call_function(target, (x, x) if target is aten.add_.Tensor else (x,))
        z = graph.call_function(aten.mm.default, (y, x))
        for node in (y, z):
            node.meta["val"] = x.meta["val"]
        graph.output((y, z))

    with pytest.raises(CannotCut, match=words):
        cut(graph_of(build), {1})


@pytest.mark.parametrize("dropped", [0.0, 0.1])
def test_attention_draws_random_numbers_where_something_is_dropped(dropped: float) -> None:
    graph = fx.Graph()
    q = graph.placeholder("q")
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert draws_random_numbers(graph.call_function(attention, (q, q, q, dropped))) == (dropped > 0)
    assert draws_random_numbers(graph.call_function(attention, (q, q, q), {"dropout_p": dropped})) == (dropped > 0)
    assert not draws_random_numbers(graph.call_function(attention, (q, q, q)))
