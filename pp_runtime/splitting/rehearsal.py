"""One run of a whole model that is watched: how values go from layer to layer, and what happens to them after the last.

A model whose layers stand in a row is cut between calls of modules, without a tracer, where what the run shows is what
the stages will do: each layer's output is the next one's input, and all that follows the last one happens in modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.skeleton import lacks_values, run_on_stand_ins

SENT = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
"""Of which kinds are a layer's inputs that another stage can be sent."""


@dataclass(frozen=True, slots=True)
class Tail:
    """What a model does after its last layer. Values are numbered: 0 is the last layer's output, then each call's."""

    calls: tuple[tuple[str, int], ...]
    """Names of modules, and the value that each is called with."""
    results: tuple[int | Any, ...]
    """The leaves of what the model returns: values, and constants in a list of one."""
    structure: TreeSpec


@dataclass(frozen=True, slots=True)
class Score:
    """What was learnt of a model."""

    given: tuple[int, frozenset[str]]
    """What the model was given: how many positional inputs, and which keywords."""
    layers: str
    """The name of the container."""
    names: tuple[str, ...]
    """Of the layers in it."""
    hidden: int | str
    """Where a layer takes the output of the one before: a position or a keyword."""
    returns_tuple: bool
    before: frozenset[str]
    """Names of the modules that are called before the first layer."""
    tail: Tail

    def __deepcopy__(self, _: Any) -> Score:  # by copies of the stages that hold it
        return self


@dataclass
class _Watched:
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)


def find_layers(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList | nn.ModuleDict | nn.Sequential]:
    """The container of the model's layers: the one named, or the longest whose modules are all of one class."""
    kinds = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    if name is not None:
        try:
            found = model.get_submodule(name)
        except AttributeError as error:
            raise PipelineUsageError(f"the model has no module {name!r}: {error}") from None
        if not isinstance(found, kinds):
            raise PipelineUsageError(f"{name!r} is a {type(found).__name__}, not a list or dict of layers")
        return name, found
    rows = [
        (len(module), -each.count("."), each, module)
        for each, module in model.named_modules()
        if isinstance(module, kinds) and len(module) > 1 and len({type(layer) for layer in module.children()}) == 1
    ]
    if not rows:
        raise PipelineUsageError(
            "no layers found: no list or dict in the model has two modules or more of one class. Name the container in "
            "layers=, or split the model with pipeline()"
        )
    _, _, name, container = max(rows, key=lambda row: row[:2])
    return name, container


def rehearse(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None = None) -> Score:
    """Run the model once, without gradients, and learn how to cut it between its layers.

    A model with parameters on the meta device is run on stand-ins for all that it has and is given. Raises
    PipelineUsageError, which says what it saw, for a model whose layers do not follow one another, or that computes
    something outside of modules after the last.
    """
    watch = partial(_rehearse, layers=layers)
    return run_on_stand_ins(watch, model, args, kwargs) if lacks_values(model) else watch(model, args, kwargs)


def _rehearse(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None) -> Score:
    container_name, container = find_layers(model, layers)
    names = tuple(container._modules)
    watched = _Watched()
    result = _run(model, container_name, list(container.children()), args, kwargs, watched)
    if len(watched.inputs) != len(names):
        raise PipelineUsageError(
            f"{container_name} has {len(names)} layers, and a forward calls {len(watched.inputs)}: each must be called "
            "once, in sequence"
        )
    hidden = _place_of_hidden(container_name, watched)
    for number, (given, named) in enumerate(watched.inputs):
        for leaf in tree_leaves((given, named)):
            if not isinstance(leaf, SENT):
                raise PipelineUsageError(
                    f"layer {number} of {container_name} is given a {type(leaf).__name__}, which other stages cannot "
                    "be sent: turn off what makes it (for transformers, config.use_cache = False)"
                )
    returns_tuple = not isinstance(watched.outputs[-1], Tensor)
    given = given_names(args, kwargs)
    return Score(given, container_name, names, hidden, returns_tuple, frozenset(watched.before), _tail(watched, result))


def given_names(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    return len(args), frozenset(name for name, value in kwargs.items() if value is not None)


def describe_given(given: tuple[int, frozenset[str]]) -> str:
    positional, keywords = given
    return f"{positional} positional inputs and {', '.join(sorted(keywords)) or 'no keywords'}"


def first_of(output: Any) -> Any:
    """The hidden state in what a layer returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _run(
    model: nn.Module,
    container: str,
    layers: Sequence[nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    watched: _Watched,
) -> Any:
    inside = 0  # of a layer, or of a module that was called after the last
    last = layers[-1]
    over = False
    names = {id(module): name for name, module in model.named_modules()}
    holders = {id(model), *(key for key, name in names.items() if f"{container}.".startswith(f"{name}."))}
    handles = []

    def enter(module: nn.Module, *_: Any) -> None:
        nonlocal inside
        inside += 1

    def leave_layer(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        nonlocal inside, over
        inside -= 1
        watched.inputs.append((given, named))
        watched.outputs.append(output)
        over = over or module is last

    def leave(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        nonlocal inside
        inside -= 1
        if over and not inside:
            watched.after.append((names[id(module)], given, named, output))
        elif not watched.inputs:
            watched.before.append(names[id(module)])

    of_layers = {id(part) for layer in layers for part in layer.modules()}
    for module in model.modules():
        is_layer = any(module is layer for layer in layers)
        if not is_layer and (id(module) in of_layers or id(module) in holders):
            continue
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave_layer if is_layer else leave, with_kwargs=True))
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _place_of_hidden(container: str, watched: _Watched) -> int | str:
    places = []
    for number, output in enumerate(watched.outputs[:-1], 1):
        before = first_of(output)
        given, named = watched.inputs[number]
        found: list[int | str] = [place for place, value in enumerate(given) if _same(value, before)]
        found += [name for name, value in named.items() if _same(value, before)]
        if len(found) != 1:
            raise PipelineUsageError(
                f"layer {number} of {container} does not take what layer {number - 1} returns as one of its inputs, so "
                "the model computes something between its layers: split it with pipeline()"
            )
        places += found
    if len(set(places)) != 1:
        raise PipelineUsageError(f"the layers of {container} take their input at different places: {places}")
    return places[0]


def _tail(watched: _Watched, result: Any) -> Tail:
    values = [first_of(watched.outputs[-1])]
    calls = []
    for name, given, named, output in watched.after:
        if len(given) != 1 or named:
            raise PipelineUsageError(f"{name} is called after the last layer with more than one input: use pipeline()")
        calls.append((name, _number_of(given[0], values, f"{name} is called with")))
        values.append(output)
    leaves, structure = tree_flatten(result)
    results: list[Any] = [
        _number_of(leaf, values, "the model returns") if isinstance(leaf, Tensor) else [leaf] for leaf in leaves
    ]
    return Tail(tuple(calls), tuple(results), structure)


def _number_of(value: Any, values: Sequence[Any], what: str) -> int:
    for number, known in reversed(list(enumerate(values))):
        if isinstance(known, Tensor) and _same(value, known):
            return number
    raise PipelineUsageError(
        f"{what} a value that is computed after the last layer outside of a module: split the model with pipeline()"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether these are the same values: one tensor, or two that look at the same memory in the same way."""
    if one is other:
        return isinstance(one, Tensor)
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and (one.shape, one.stride(), one.storage_offset()) == (other.shape, other.stride(), other.storage_offset())
        and one.dtype == other.dtype
    )
