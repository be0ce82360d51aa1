"""A model as units that are run one after the other, each as if it were a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pp_runtime.running import stage_backward, stage_backward_input, stage_backward_weight
from pp_runtime.splitting import find_layers, layer_modules, tensors_of


@dataclass(frozen=True, slots=True)
class Sample:
    """What a unit is given: a microbatch, or what the unit before returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any = None


class UnitRow:
    """The units of a model whose layers stand in a list or dict."""

    def __init__(
        self,
        model: nn.Module,
        sample: Sample,
        layers: str | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> None:
        count = len(find_layers(model, layers)[1])
        cut = layer_modules(model, [1] * count + [0], range(count + 1), sample.args, sample.kwargs, layers=layers)
        self._modules = [cut[index][0] for index in range(count + 1)]
        self._loss_fn = loss_fn
        self.devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}

    def __len__(self) -> int:
        return len(self._modules)

    def run(self, index: int, sample: Sample) -> Any:
        """The forward of a unit; what the last one returns is the loss if there is a function for it."""
        output = self._modules[index](*sample.args, **sample.kwargs)
        last = index == len(self) - 1
        return self._loss_fn(output, sample.target) if last and self._loss_fn is not None else output

    def run_all(self, sample: Sample) -> Any:
        """The forward of all units as one."""
        for index in range(len(self)):
            sample = Sample((self.run(index, sample),), {}, sample.target)
        return sample.args[0]

    def chain(self, sample: Sample, run: Callable[[int, Sample], Any]) -> None:
        """Call ``run`` with each unit's number and what it is given: what ``run`` returned for the unit before."""
        for index in range(len(self)):
            sample = Sample((run(index, sample),), {}, sample.target)

    def parameters(self, index: int) -> dict[Any, tuple[int, int]]:
        """The bytes of a unit's parameters and buffers, and those of them that are trained."""
        module = self._modules[index]
        held: list[Tensor] = [*module.parameters(), *module.buffers()]
        return {id(each): (each.nbytes, each.nbytes * each.requires_grad) for each in held}


class Pass:
    """A forward of a unit, or of some, on an input as a stage receives it, and its backward."""

    def __init__(self, run: Callable[[Sample], Any], given: Sample, copied: bool = False) -> None:
        self._run = run
        anchor = torch.zeros((), requires_grad=True)
        leaves, structure = tree_flatten((given.args, dict(given.kwargs)))
        leaves = [
            _Received.apply(anchor, leaf.clone() if copied else leaf)
            if isinstance(leaf, Tensor) and leaf.requires_grad
            else leaf
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(leaves, structure)
        self._given = Sample(args, kwargs, given.target)
        self.trained_inputs = [tensor for tensor in tensors_of(leaves) if tensor.requires_grad]
        self.outputs: list[Tensor] = []
        self._output: Any = None
        self._gradients: list[Tensor | None] = []
        self._groups: list[dict[str, Any]] = []

    def forward(self) -> None:
        self._output = self._run(self._given)
        self.outputs = tensors_of(self._output)

    def make_gradients(self) -> None:
        """What comes back for the outputs; it is there before the backward."""
        self._gradients = [torch.ones_like(output) if output.requires_grad else None for output in self.outputs]

    def backward(self) -> None:
        stage_backward(self.outputs, self._gradients, ())

    def backward_input(self) -> None:
        _, self._groups = stage_backward_input(self.outputs, self._gradients, self.trained_inputs, iter(()))

    def backward_weight(self) -> None:
        stage_backward_weight((), self._groups)
        self._groups = []

    @property
    def trained_outputs(self) -> list[Tensor]:
        return [output for output in self.outputs if output.requires_grad]

    @property
    def gradients(self) -> list[Tensor]:
        return [gradient for gradient in self._gradients if gradient is not None]

    def let_go(self) -> None:
        """Hold no more than what the backward for the weights does."""
        self._given, self._output = Sample((), {}), None
        self.trained_inputs, self.outputs, self._gradients = [], [], []

    def passed_on(self) -> Any:
        """The output in memory of its own, as another stage receives it."""
        return tree_map_only(
            Tensor, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad), self._output
        )


class _Received(torch.autograd.Function):
    """A tensor that came from another stage: no leaf, and its gradient goes nowhere from here."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None
