"""A compiled backward that runs whole, or as its two halves where a split schedule asks.

How a schedule asks is in ``requests``.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch.utils._python_dispatch import _disable_current_modes

from pp_runtime.running.compiled.graph_cut import CannotCut, Cut, copied, cut, results_of
from pp_runtime.running.compiled.operations import is_tensor
from pp_runtime.running.compiled.places import Places
from pp_runtime.running.compiled.requests import take_request

logger = logging.getLogger(__name__)

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Compiles a graph for such arguments; what it returns takes them one by one, or in one list where it is boxed."""


def boxed(compiled: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """Takes the arguments in a list, which it may empty as it goes."""
    return compiled if getattr(compiled, "_boxed_call", False) else make_boxed_func(compiled)


class SplittableBackward:
    """The backward of one compiled region: its graph, and whatever of it has been compiled.

    Each of the three graphs is compiled when it is first to run, so a step of an unsplit schedule compiles the whole
    alone, and one of a split schedule mostly the halves alone.
    """

    def __init__(self, graph: fx.GraphModule, arguments: Sequence[Any], compile_whole: Compile, compile_half: Compile):
        self._boxed_call = True
        self._graph = graph
        self._arguments = tuple(arguments)
        self._compile_whole, self._compile_half = compile_whole, compile_half
        self._tracing, self._compiling = TracingContext.try_get(), CompileContext.try_get()
        # Of a region that DDP's optimizer broke into several graphs, the context is one, and what it says the last's.
        self._metadata = None if self._tracing is None else self._tracing.fw_metadata
        self._whole: Callable[[list[Any]], Any] | None = None
        self._halves: dict[frozenset[int], Halves | None] = {}
        self._places: dict[tuple[bool, ...], Places] = {}
        self._lock = threading.RLock()
        placeholders = graph.graph.find_nodes(op="placeholder")
        results = results_of(graph.graph)
        others = {i: one for i, one in enumerate(results) if isinstance(one, fx.Node) and not is_tensor(one)}
        # What torch makes subclasses of is among the results: meshes and sizes, which are arguments too.
        self._passed_on = {i: placeholders.index(one) for i, one in others.items() if one in placeholders}
        self._answers = len(self._passed_on) == len(others)
        self.stand_ins: Sequence[Any] = _stand_ins(results)
        self._number_of = {id(one): i for i, one in enumerate(self.stand_ins) if isinstance(one, torch.Tensor)}
        if any(isinstance(argument, torch.SymInt) for argument in arguments):
            self.whole()  # now, so that what the compiler assumes of a size becomes a condition of the forward

    def __call__(self, arguments: list[Any]) -> Any:
        request = take_request() if self._answers else None
        if request is None:
            return self.whole()(arguments)
        answer = [*self.stand_ins]
        for result, argument in self._passed_on.items():
            answer[result] = arguments[argument]
        request.answer(self, arguments)
        return answer

    def whole(self) -> Callable[[list[Any]], Any]:
        with self._lock:
            if self._whole is None:
                # The compiler may change the graph, which the cut still needs.
                graph = copied(self._graph)
                self._whole = self._compile(self._compile_whole, graph, self._arguments, self._metadata)
            return self._whole

    def halves(self, weight_results: frozenset[int]) -> Halves | None:
        """The two halves for these results as weight gradients; None where the graph runs whole, which a log says."""
        with self._lock:
            if weight_results not in self._halves:
                try:
                    made = cut(self._graph, weight_results, self._parameters())
                    self._halves[weight_results] = Halves(self, made)
                    logger.debug("%s is cut: %s", self, self._halves[weight_results])
                except CannotCut as objection:
                    self._halves[weight_results] = None
                    logger.debug("%s runs whole in I: %s", self, objection)
            return self._halves[weight_results]

    def _parameters(self) -> list[int]:
        """The arguments that live beyond the step: parameters and buffers of the module that was compiled."""
        static = () if self._metadata is None else self._metadata.static_input_indices
        names = {f"primals_{1 + index}" for index in static or ()}
        placeholders = self._graph.graph.find_nodes(op="placeholder")
        return [number for number, node in enumerate(placeholders) if node.name in names]

    def _compile(
        self, how: Compile, graph: fx.GraphModule, arguments: Sequence[Any], metadata: Any
    ) -> Callable[[list[Any]], Any]:
        """As torch compiles a backward that it comes to late: under what was known when it was traced."""
        with ExitStack() as contexts:
            contexts.enter_context(compile_lock)
            contexts.enter_context(torch._C._DisableAutocast())
            if self._compiling is not None:
                contexts.enter_context(compile_context(self._compiling))
            if self._tracing is not None:
                contexts.enter_context(tracing(self._tracing))
                contexts.callback(setattr, self._tracing, "fw_metadata", self._tracing.fw_metadata)
                self._tracing.fw_metadata = metadata
            return boxed(how(graph, list(arguments)))

    def compile_half(
        self, graph: fx.GraphModule, arguments: Sequence[Any]
    ) -> tuple[Callable[[list[Any]], Any], Sequence[Any]]:
        """The half, and the strides of its results where the compiler chooses those itself.

        Raises CannotCut where the compiler assumes something of a size that the forward did not ask for.
        """
        metadata = copy.copy(self._metadata)
        if metadata is not None:
            # The arguments of the whole graph, by number, that it may overwrite. A half may overwrite none.
            metadata.bw_donated_idxs = []
        before = self._assumptions()
        strides: Sequence[Any] = ()

        def compile_half(graph: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
            nonlocal strides
            with TracingContext.report_output_strides() as reported:
                compiled = self._compile_half(graph, arguments)
            strides = reported or ()
            return compiled

        compiled = self._compile(compile_half, graph, arguments, metadata)
        if self._assumptions() != before:
            raise CannotCut("its halves would hold for some sizes only")
        return compiled, strides

    def _assumptions(self) -> object:
        mode = None if self._tracing is None else self._tracing.fake_mode
        shapes = None if mode is None else mode.shape_env
        if shapes is None:
            return None
        return len(shapes.guards), dict(shapes.replacements), shapes.counter.get("ignored_backward_guard", 0)

    def example(self, argument: int) -> Any:
        return self._arguments[argument]

    def places(self, outputs: Sequence[Any], on_weight_side: tuple[bool, ...]) -> Places:
        """Where the results go, by what the node made of their stand-ins."""
        found = self._places.get(on_weight_side)
        if found is None:
            found = Places(outputs, on_weight_side, self._number_of)
            if found.plain:
                self._places[on_weight_side] = found
        return found

    def __repr__(self) -> str:
        made = self._compiling
        name = "a compiled backward" if made is None else f"the backward of compilation {made.compile_id}"
        return f"{name} ({len(self._graph.graph.nodes)} nodes, {len(self.stand_ins)} gradients)"


def _stand_ins(results: Sequence[Any]) -> list[Any]:
    """For each gradient that the graph returns a tensor of its own that takes no memory to speak of."""
    with _disable_current_modes():  # torch compiles under a mode that makes tensors without memory
        return [
            (_stand_in(result.meta["val"]) if is_tensor(result) else None) if isinstance(result, fx.Node) else result
            for result in results
        ]


def _stand_in(value: torch.Tensor) -> torch.Tensor:
    one = torch.zeros((), dtype=value.dtype, device=value.device)
    return one.expand(value.shape) if all(isinstance(size, int) for size in value.shape) else one.expand(0)


def _laid_out(value: Any, stride: tuple[Any, ...] | None) -> Any:
    """A value to compile for, with the stride that the compiler gave it where it is made."""
    if stride is None or not isinstance(value, torch.Tensor) or tuple(value.stride()) == tuple(stride):
        return value
    return value.as_strided(value.size(), stride)


class Halves:
    """dI and dW of one cut."""

    def __init__(self, backward: SplittableBackward, made: Cut) -> None:
        self._backward = backward
        self._cut = made
        examples = [backward.example(argument) for argument in made.input_arguments]
        assert len(made.input_half.graph.find_nodes(op="placeholder")) == len(examples)
        self._input_half, strides = backward.compile_half(made.input_half, examples)
        given = made.weight_half.graph.find_nodes(op="placeholder")
        values = [node.meta["val"] for node in given[len(made.weight_arguments) :]]
        if strides:
            laid_out = strides[len(made.input_results) + len(made.ready_results) :]
            values = [_laid_out(value, stride) for value, stride in zip(values, laid_out, strict=True)]
        examples = [backward.example(argument) for argument in made.weight_arguments] + values
        self._weight_half, _ = backward.compile_half(made.weight_half, examples)

    def run_input_half(self, arguments: list[Any], results: list[Any]) -> list[Any]:
        """Fill in the results that I makes; returns what dW takes. Empties the arguments."""
        made = self._cut
        kept = [arguments[i] for i in made.weight_arguments]
        taken = [arguments[i] for i in made.input_arguments]
        arguments.clear()
        found = self._input_half(taken)
        at_hand = (*made.input_results, *made.ready_results)
        for i, result in zip(at_hand, found, strict=False):
            results[i] = result
        kept.extend(found[len(at_hand) :])
        return kept

    def run_weight_half(self, kept: list[Any], results: list[Any]) -> None:
        for i, result in zip(self._cut.weight_results, self._weight_half(kept), strict=True):
            results[i] = result

    def __repr__(self) -> str:
        made = self._cut
        return (
            f"dI makes {len(made.input_results)} input gradients and {len(made.ready_results)} of the weights', dW "
            f"{len(made.weight_results)}; {made.kept_bytes / 2**20:.3g} MiB live between them"
        )
