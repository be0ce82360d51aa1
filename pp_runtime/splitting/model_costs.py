"""What a whole model costs along its row of layers: what comes before them, each of them, and what comes after."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.layer_costs import moment, noted_saves, weights_and_gradients
from pp_runtime.splitting.rehearsal import find_layers, rehearse
from pp_runtime.splitting.skeleton import lacks_values, run_on_stand_ins
from pp_runtime.splitting.unchanged import unchanged


@dataclass(frozen=True, slots=True)
class RowCosts:
    """In one unit."""

    before: float
    layers: tuple[float, ...]
    after: float

    @staticmethod
    def of(costs: Sequence[float]) -> RowCosts:
        before, *layers, after = costs
        return RowCosts(before, tuple(layers), after)


def model_costs(
    model: nn.Module, by: str, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None = None
) -> RowCosts:
    """The costs of a model's layers, and of what its first and last stage have beside them.

    ``by`` is "time", the seconds of a forward of the example, the median of five; "parameters", their number; "flops",
    of a forward, and "memory", the bytes of parameters and gradients and of what a forward keeps for its backward, both
    found without computing anything, on the meta device. Raises PipelineUsageError for another one, and for the time of
    a model that is on the meta device itself.
    """
    if by not in _MEASURES:
        raise PipelineUsageError(f"partition is 'layers', {', '.join(map(repr, _MEASURES))} or sizes, not {by!r}")
    return RowCosts.of(_MEASURES[by](model, args, kwargs, layers))


def _times(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None) -> list[float]:
    if lacks_values(model):
        raise PipelineUsageError(
            "the model is on the meta device, where there is no time to measure: take partition='flops', 'layers' or "
            "sizes"
        )
    read = partial(moment, {parameter.device for parameter in model.parameters()})
    with unchanged([model]), torch.no_grad():
        runs = [_between(read, model, args, kwargs, layers) for _ in range(6)]
    return [statistics.median(spans) for spans in zip(*runs[1:], strict=True)]  # the first warms up


def _parameters(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None) -> list[float]:
    return [float(sum(each.numel() for each in held)) for held in _held(model, args, kwargs, layers)]


def _flops(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None) -> list[float]:
    from torch.utils.flop_counter import FlopCounterMode

    def count(stand_in: nn.Module, moved_args: Sequence[Any], moved_kwargs: Mapping[str, Any]) -> list[float]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            return _between(counter.get_total_flops, stand_in, moved_args, moved_kwargs, layers)

    return run_on_stand_ins(count, model, args, kwargs)


def _memory(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None) -> list[float]:
    kept = run_on_stand_ins(partial(_kept, layers=layers), model, args, kwargs)
    weights = map(weights_and_gradients, _held(model, args, kwargs, layers))
    return [float(sum(both)) for both in zip(kept, weights, strict=True)]


def _kept(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None) -> list[float]:
    """The bytes that each part of a forward is the first to keep."""
    with torch.enable_grad(), noted_saves(model) as kept:
        return _between(lambda: sum(each.nbytes() for each in kept.values()), model, args, kwargs, layers)


def _held(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None
) -> list[dict[nn.Parameter, None]]:
    """The parameters of what comes before the layers, of each layer, and of what comes after; shared ones in each."""
    score = rehearse(model, args, kwargs, layers)
    after = tuple(f"{name}." for name in score.modules_after)
    places = {f"{score.layers}.{name}.": number for number, name in enumerate(score.names, 1)}
    held: list[dict[nn.Parameter, None]] = [{} for _ in range(len(places) + 2)]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = (number for prefix, number in places.items() if name.startswith(prefix))
        held[next(found, -1 if name.startswith(after) else 0)][parameter] = None
    return held


def _between(
    read: Callable[[], float], model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None
) -> list[float]:
    """By how much what is read grows in a forward: before the layers, in each of them, after them."""
    readings: list[float] = []

    def mark(*_: Any) -> None:
        readings.append(read())

    container = find_layers(model, layers)[1].children()
    handles = [
        hook
        for layer in container
        for hook in (layer.register_forward_pre_hook(mark), layer.register_forward_hook(mark))
    ]
    try:
        mark()
        model(*args, **kwargs)
        mark()
    finally:
        for handle in handles:
            handle.remove()
    spans = [end - begin for begin, end in zip(readings, readings[1:], strict=False)]
    return [spans[0], *spans[1:-1:2], spans[-1]]


_MEASURES: dict[str, Callable[[nn.Module, Sequence[Any], Mapping[str, Any], str | None], list[float]]] = {
    "time": _times,
    "parameters": _parameters,
    "flops": _flops,
    "memory": _memory,
}
