"""What a rank's stages take by themselves, in plain PyTorch: what a step's time is held against."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pp_runtime import _C
from pp_runtime.orders.ir import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD, Action, leaves


class StagesAlone:
    """Times F, B and I of a rank's stages, a sample at a time, so that samples can alternate with steps.

    A sample runs the rank's actions in their order, without messages and without W: once with B in the place of I, and
    once with I, the backward of a graph that leads to the inputs only. So every action meets the caches as its order
    leaves them. The last stage's F has the loss, the first one's I nothing to do. Where the order splits backwards, a
    third run has them as pp_runtime splits them.
    """

    def __init__(
        self, modules: Mapping[int, nn.Module], last: int, microbatch: tuple[int, ...], actions: Iterable[Action]
    ) -> None:
        self._modules, self._last = modules, last
        self._actions = [
            (action.computation_type, action.stage_index, action.microbatch_index) for action in leaves(actions)
        ]
        self._splits = any(kind is BACKWARD_WEIGHT for kind, _, _ in self._actions)
        self._inputs = {i: torch.randn(microbatch).requires_grad_(i > 0) for i in modules}
        self._target = torch.randn(microbatch)
        self._gradients = {i: torch.ones(()) if i == last else torch.randn(microbatch) for i in modules}
        self._samples: dict[tuple[int, str], list[float]] = defaultdict(list)

    def sample(self) -> None:
        """Time every action of a step."""
        self._run("F", dict.fromkeys(self._modules, "B"))
        later = [i for i in self._modules if i > 0]
        for i in later:
            self._modules[i].requires_grad_(False)
        self._run("F for I", {i: "I" if i in later else "B among I" for i in self._modules})
        for i in later:
            self._modules[i].requires_grad_(True)
        if self._splits:
            self._run_split()

    def times(self) -> dict[int, dict[str, float]]:
        """Each stage's medians in seconds. W is what B takes beyond I, so splitting and messages are free here."""
        return {
            i: self._with(i, (inputs := min(self._of(i, "B"), self._of(i, "I"))), self._of(i, "B") - inputs)
            for i in self._modules
        }

    def times_when_split(self) -> dict[int, dict[str, float]]:
        """The same with I and W as pp_runtime splits them."""
        return {i: self._with(i, self._of(i, "split I"), self._of(i, "split W")) for i in self._modules}

    def sample_as_run(self) -> None:
        """Time every action of a step as pp_runtime runs it, and nothing else."""
        self._run_split()

    def times_as_run(self) -> dict[int, dict[str, float]]:
        return {i: {kind: self._of(i, f"split {kind}") for kind in "FIWB"} for i in self._modules}

    def _with(self, i: int, inputs: float, weights: float) -> dict[str, float]:
        return {"F": self._of(i, "F"), "B": self._of(i, "B"), "I": inputs, "W": weights}

    def _of(self, i: int, kind: str) -> float:
        return statistics.median(self._samples.get((i, kind), [0.0]))

    def _run(self, forward: str, backwards: Mapping[int, str]) -> None:
        outputs: dict[tuple[Any, Any], torch.Tensor] = {}
        for kind, i, microbatch in self._actions:
            if kind is FORWARD:
                outputs[i, microbatch] = self._timed(i, forward, self._forward, i)
            elif kind in (FULL_BACKWARD, BACKWARD_INPUT):
                output = outputs.pop((i, microbatch))
                self._timed(i, backwards[i], torch.autograd.backward, output, self._gradients[i])
                del output

    def _run_split(self) -> None:
        outputs: dict[tuple[Any, Any], torch.Tensor] = {}
        halves: dict[tuple[Any, Any], Any] = {}
        for kind, i, microbatch in self._actions:
            if kind is FORWARD:
                outputs[i, microbatch] = self._timed(i, "split F", self._forward, i)
            elif kind is FULL_BACKWARD:
                output = outputs.pop((i, microbatch))
                self._timed(i, "split B", torch.autograd.backward, output, self._gradients[i])
                del output
            elif kind is BACKWARD_INPUT and i > 0:
                roots = ([outputs.pop((i, microbatch))], [self._gradients[i]], [self._inputs[i]])
                halves[i, microbatch] = self._timed(i, "split I", _C.input_backward, *roots)[1]
                del roots
            elif kind is BACKWARD_WEIGHT and i > 0:
                self._timed(i, "split W", halves.pop((i, microbatch)).run)
            elif kind is BACKWARD_WEIGHT:
                output = outputs.pop((i, microbatch))
                self._timed(i, "split W", torch.autograd.backward, output, self._gradients[i])
                del output

    def _forward(self, i: int) -> torch.Tensor:
        out = self._modules[i](self._inputs[i])
        return nn.functional.mse_loss(out, self._target) if i == self._last else out

    def _timed(self, i: int, kind: str, work: Callable[..., Any], *args: Any) -> Any:
        begin = time.monotonic()
        result = work(*args)
        self._samples[i, kind].append(time.monotonic() - begin)
        return result
