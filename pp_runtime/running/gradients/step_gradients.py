"""What a step adds to gradients, told from what they held before it.

    before  p.grad = g                       of earlier steps that were not zeroed
    begin   p.grad = None, g is set aside
    step    p.grad = g0 + g1 + g2 + g3       the microbatches', reduced over data-parallel ranks
    end     p.grad = g + (g0 + g1 + g2 + g3) / 4

Each parameter is scaled once, whichever stages share it. Parameters of the stages and of the loss function are known
beforehand; other leaves of the graph (inputs that require gradients, modules that nobody registered) are found in it.
While a step adds to gradients that were not zeroed, both are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pp_runtime import _C
from pp_runtime.running.held_stage import HeldStage
from pp_runtime.running.values import is_dtensor, local_part


class StepGradients:
    """The gradients of one step on this rank."""

    def __init__(self, stages: Sequence[HeldStage]) -> None:
        self._stages = stages
        self._parameters: dict[int, torch.Tensor] = {}
        self._shared: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._in_buffers: set[int] = set()
        self._scaled: set[int] = set()
        self._waiting: dict[int, torch.Tensor] = {}
        self._asked = 1
        self._leaves: _C.StepLeaves | None = None
        for stage in stages:
            adapter = stage.adapter()
            if adapter is not None:
                adapter.reshard()  # the parameters that an optimizer has, not the gathered ones
            own = {id(parameter): parameter for module in stage.modules() for parameter in module.parameters()}
            if adapter is not None and adapter.keeps_gradients():
                self._in_buffers.update(own)
            self._shared.update(self._parameters.keys() & own.keys())
            self._parameters.update(own)

    def begin(self) -> None:
        """Set aside what the gradients hold, and look for other leaves from now on."""
        for key, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is not None:
                self._before[key] = (parameter, gradient.clone() if key in self._in_buffers else gradient)
                parameter.grad = None
        leaves = _C.StepLeaves(list(self._parameters.values()))
        for stage in self._stages:
            stage._core.follow_leaves(leaves)
            stage._gradients = self
        self._leaves = leaves

    def end(self, divisor: int | None) -> None:
        """Divide what was added and not scaled yet, then add what was set aside. 1 leaves the sums as they are.

        With None, what ``scale`` was called for is divided and nothing else: a custom function reduces and scales.
        """
        leaves = self._leaves.take() if self._leaves is not None else []
        self._before.update({id(leaf): (leaf, before) for leaf, before in leaves if before is not None})
        self._shared.clear()
        if divisor is None:
            self.scale(self._waiting.values(), self._asked)
        else:
            self.scale(self._parameters.values(), divisor)
        self.scale([leaf for leaf, _ in leaves], self._asked if divisor is None else divisor)
        with torch.no_grad():
            for key, (parameter, before) in self._before.items():
                _put_back(parameter, before, in_buffer=key in self._in_buffers)

    def close(self) -> None:
        """Look for leaves no more. Of a step that failed no gradients stay, those of the leaves found included."""
        for leaf, _ in self._leaves.take() if self._leaves is not None else ():
            leaf.grad = None
        for stage in self._stages:
            stage._core.follow_leaves(None)
            stage._gradients = None

    def scale(self, parameters: Iterable[torch.Tensor], divisor: int) -> None:
        """Divide what these have so far, each parameter once a step; one that stages share waits for the step's end."""
        self._asked = divisor
        unscaled = {id(p): p for p in parameters if id(p) not in self._scaled}
        self._waiting.update({key: p for key, p in unscaled.items() if key in self._shared})
        fresh = {key: p for key, p in unscaled.items() if key not in self._shared}
        self._scaled.update(fresh)
        scale_gradients(fresh.values(), divisor)


def scale_gradients(parameters: Iterable[torch.Tensor], divisor: int) -> None:
    """Divide all gradients, those of plain tensors in one fused call. ``divisor`` 1 leaves them as they are."""
    if divisor == 1:
        return
    plain: list[torch.Tensor] = []
    with torch.no_grad():
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if is_dtensor(gradient):
                gradient = local_part(gradient)  # a division commutes with every placement
            if type(gradient) is torch.Tensor and gradient.layout is torch.strided:
                plain.append(gradient)
            else:
                gradient.div_(divisor)
        if plain:
            torch._foreach_div_(plain, divisor)


def _put_back(parameter: torch.Tensor, before: torch.Tensor, *, in_buffer: bool) -> None:
    added = parameter.grad
    if added is None:
        parameter.grad = before
    elif in_buffer or (before.is_sparse and not added.is_sparse):
        added.add_(before)
    else:
        # In place, for programs that hold the gradients themselves.
        parameter.grad = before.add_(added)
