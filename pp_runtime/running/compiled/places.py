"""Which result of a backward graph is the gradient for which input of its compiled region."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Places:
    """Found by the stand-ins that a node returned: an output is one, a tensor subclass that holds some, or None."""

    def __init__(self, outputs: Sequence[Any], on_weight_side: Sequence[bool], number_of: Mapping[int, int]) -> None:
        """``number_of``: the number of the result that a stand-in, given by its ``id``, stands for."""
        self._number_of = number_of
        places = [number_of.get(id(output), output) for output in outputs]
        self._of_inputs = [None if later else place for place, later in zip(places, on_weight_side, strict=True)]
        self._of_weights = [place if later else None for place, later in zip(places, on_weight_side, strict=True)]
        self.weight_results = frozenset(number for place in self._of_weights for number in self._numbers(place))
        self.plain = all(place is None or isinstance(place, int) for place in places)
        """Whether these are the places of every run, and not of this one's subclasses."""

    def input_gradients(self, results: Sequence[Any]) -> list[Any]:
        return [self._gradient(place, results) for place in self._of_inputs]

    def weight_gradients(self, results: Sequence[Any]) -> list[Any]:
        return [self._gradient(place, results) for place in self._of_weights]

    def _numbers(self, place: Any) -> Iterator[int]:
        if isinstance(place, int):
            yield place
        elif is_traceable_wrapper_subclass(place):
            for name in place.__tensor_flatten__()[0]:
                inner = getattr(place, name)
                yield from self._numbers(self._number_of.get(id(inner), inner))

    def _gradient(self, place: Any, results: Sequence[Any]) -> Any:
        if place is None:
            return None
        if isinstance(place, int):
            return results[place]
        if not is_traceable_wrapper_subclass(place):
            return place
        names, context = place.__tensor_flatten__()
        parts = {name: getattr(place, name) for name in names}
        inner = {name: self._gradient(self._number_of.get(id(part), part), results) for name, part in parts.items()}
        return type(place).__tensor_unflatten__(inner, context, place.shape, place.stride())
