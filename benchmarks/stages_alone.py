"""What a rank's stages take by themselves, in plain PyTorch: what a step's time is held against."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pp_runtime.ir import BACKWARD_INPUT, FORWARD, FULL_BACKWARD, Action, leaves


class StagesAlone:
    """Times F, B and I of a rank's stages, a sample at a time, so that samples can alternate with steps.

    A sample runs the rank's actions in their order, without messages and without W: once with B in the place of I, and
    once with I, the backward of a graph that leads to the inputs only. So every action meets the caches as its order
    leaves them. The last stage's F has the loss, the first one's I nothing to do.
    """

    def __init__(
        self, modules: Mapping[int, nn.Module], last: int, microbatch: tuple[int, ...], actions: Iterable[Action]
    ) -> None:
        self._modules, self._last = modules, last
        kinds = {FORWARD: False, FULL_BACKWARD: True, BACKWARD_INPUT: True}
        self._actions = [
            (kinds[action.computation_type], action.stage_index, action.microbatch_index)
            for action in leaves(actions)
            if action.computation_type in kinds
        ]
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

    def times(self) -> dict[int, dict[str, float]]:
        """Each stage's medians in seconds. W is what B takes beyond I, so splitting and messages are free here."""
        medians = {key: statistics.median(samples) for key, samples in self._samples.items()}
        found = {}
        for i in self._modules:
            whole = medians[i, "B"]
            inputs = min(whole, medians.get((i, "I"), 0.0))
            found[i] = {"F": medians[i, "F"], "B": whole, "I": inputs, "W": whole - inputs}
        return found

    def _run(self, forward: str, backwards: Mapping[int, str]) -> None:
        outputs: dict[tuple[Any, Any], torch.Tensor] = {}
        for is_backward, i, microbatch in self._actions:
            if is_backward:
                output = outputs.pop((i, microbatch))
                self._timed(i, backwards[i], torch.autograd.backward, output, self._gradients[i])
                del output
            else:
                outputs[i, microbatch] = self._timed(i, forward, self._forward, i)

    def _forward(self, i: int) -> torch.Tensor:
        out = self._modules[i](self._inputs[i])
        return nn.functional.mse_loss(out, self._target) if i == self._last else out

    def _timed(self, i: int, kind: str, work: Callable[..., Any], *args: Any) -> Any:
        begin = time.monotonic()
        result = work(*args)
        self._samples[i, kind].append(time.monotonic() - begin)
        return result
