"""What a model does after its last layer: calls of modules, and of functions that mean the same for any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map_only, tree_unflatten


@dataclass(frozen=True, slots=True)
class Value:
    """Stands for one that is known by then: 0 is the last layer's output, then what each step gave."""

    number: int


@dataclass(frozen=True, slots=True)
class Step:
    """A call of a module, by its name, or of a function of torch's."""

    what: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tail:
    """The steps, and the leaves of what the model returns: values and constants."""

    steps: tuple[Step, ...]
    results: tuple[Any, ...]
    structure: TreeSpec

    @property
    def modules(self) -> list[str]:
        """Names of the modules that are called."""
        return [step.what for step in self.steps if isinstance(step.what, str)]

    def run(self, hidden: Any, module: nn.Module) -> Any:
        """What ``module``, which has these modules, returns for the last layer's output."""
        values = [hidden]

        def known(nest: Any) -> Any:
            return tree_map_only(Value, lambda value: values[value.number], nest)

        for step in self.steps:
            call = module.get_submodule(step.what) if isinstance(step.what, str) else step.what
            values.append(call(*known(step.args), **known(step.kwargs)))
        return tree_unflatten(known(list(self.results)), self.structure)


def can_be_repeated(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], constants: frozenset[float]
) -> bool:
    """Whether a call was not of this batch alone: a number in it may have been one of its sizes.

    So numbers are those of the model (``constants``: see :func:`numbers_of`), dimensions, and first and last places.
    """
    name = getattr(function, "__name__", "")
    if all(getattr(place, name, None) is not function for place in (torch, Tensor, nn.functional)):
        return False
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(map(_is_for_any_size, index))
    others = [leaf for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
    numbers = [other for other in others if not isinstance(other, (bool, str, torch.dtype, type(None)))]
    if name in _ELEMENTWISE:
        return not numbers
    if name in _WITH_NUMBERS:
        return all(isinstance(number, float) and number in constants for number in numbers)
    return name in _ALONG and all(isinstance(number, int) and abs(number) < _DIMENSIONS for number in numbers)


def numbers_of(model: nn.Module) -> frozenset[float]:
    """The floating-point numbers that a model's modules and its configuration hold."""
    holders: Iterable[Any] = (*model.modules(), getattr(model, "config", None))
    return frozenset(
        value
        for holder in holders
        if hasattr(holder, "__dict__")
        for value in vars(holder).values()
        if type(value) is float
    )


def _is_for_any_size(place: Any) -> bool:
    if isinstance(place, slice):
        return place in (slice(None), slice(0, None))
    return place is None or place is ... or (type(place) is int and place in (0, -1))


_DIMENSIONS = 5
_ELEMENTWISE = frozenset(
    ("tanh", "sigmoid", "relu", "silu", "gelu", "softplus", "exp", "log", "neg", "float", "contiguous", "clone")
)
_WITH_NUMBERS = frozenset(("mul", "div", "add", "sub"))
_ALONG = frozenset(("softmax", "log_softmax", "mean", "amax", "squeeze", "unsqueeze", "transpose", "flatten"))
