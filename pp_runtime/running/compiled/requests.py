"""How a split schedule asks a compiled backward for its halves.

A compiled region's node in the autograd graph is a Python function around a graph of plain tensors. A CompiledNode
(csrc/backward/compiled_node.h) opens a :class:`Request` and runs the node. The compiled backward inside finds the
request, leaves its arguments there and returns stand-ins, one a gradient; what torch does to them on the way out (it
makes tensor subclasses of some, drops others) shows where each gradient belongs. Then the request computes: dI at once,
dW when it is asked. A backward of another backend does not answer: it has run whole, and W hands on what it made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from pp_runtime.running.compiled.places import Places

_asking = threading.local()


class RunsHalves(Protocol):
    """dI and dW of a backward that is cut."""

    def run_input_half(self, arguments: list[Any], results: list[Any]) -> list[Any]:
        """Fill in the results that I makes; returns what dW takes. Empties the arguments."""

    def run_weight_half(self, kept: list[Any], results: list[Any]) -> None:
        """Fill in the others. Empties what dW takes."""


class Answering(Protocol):
    """A compiled backward of ours."""

    stand_ins: Sequence[Any]

    def whole(self) -> Callable[[list[Any]], Any]: ...

    def halves(self, weight_results: frozenset[int]) -> RunsHalves | None: ...

    def places(self, outputs: Sequence[Any], on_weight_side: tuple[bool, ...]) -> Places: ...


class Request:
    """One microbatch's run of one compiled region in two halves. Made, asked and dropped by a CompiledNode."""

    def __init__(self) -> None:
        self._backward: Answering | None = None
        self._arguments: list[Any] = []
        self._places: Places | None = None
        self._results: list[Any] = []
        self._halves: RunsHalves | None = None
        self._kept: list[Any] = []
        self._versions: list[int] = []

    def open(self) -> None:
        """Until it is closed, the next compiled backward on this thread answers."""
        _asking.request = self

    def close(self) -> None:
        _asking.request = None

    def answer(self, backward: Answering, arguments: list[Any]) -> None:
        self._backward, self._arguments = backward, [*arguments]
        arguments.clear()

    def input_gradients(self, outputs: list[Any], on_weight_side: Sequence[bool]) -> list[Any]:
        """I. ``outputs`` is what the node returned: gradients, or stand-ins where its backward answered."""
        backward = self._backward
        if backward is None:
            self._results = [output if later else None for output, later in zip(outputs, on_weight_side, strict=True)]
            return [None if later else output for output, later in zip(outputs, on_weight_side, strict=True)]
        self._places = places = backward.places(outputs, tuple(on_weight_side))
        results: list[Any] = [None] * len(backward.stand_ins)
        with torch._C._DisableAutocast():
            self._halves = backward.halves(places.weight_results)
            if self._halves is None:
                results[:] = backward.whole()(self._arguments)
                self._arguments.clear()
            else:
                self._kept = self._halves.run_input_half(self._arguments, results)
                self._versions = self._kept_versions()
        gradients = places.input_gradients(results)
        self._results = [result if i in places.weight_results else None for i, result in enumerate(results)]
        return gradients

    def weight_gradients(self) -> list[Any]:
        """W."""
        if self._places is None:
            return self._results
        if self._halves is not None:
            if self._kept_versions() != self._versions:
                raise RuntimeError(
                    "One of the tensors that the weight gradients of a compiled region are computed from was changed "
                    "in place between I and W of its microbatch: change a copy of it, or do so after the step."
                )
            kept, self._kept = self._kept, []
            with torch._C._DisableAutocast():
                self._halves.run_weight_half(kept, self._results)
        return self._places.weight_gradients(self._results)

    def _kept_versions(self) -> list[int]:
        return [value._version for value in self._kept if isinstance(value, torch.Tensor)]


def take_request() -> Request | None:
    request, _asking.request = getattr(_asking, "request", None), None
    return request
