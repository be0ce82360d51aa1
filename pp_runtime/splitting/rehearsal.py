"""One run of a whole model that is watched: how values go from layer to layer, and what happens to them after the last.

A model whose layers stand in a row is cut between calls of modules, without a tracer, where what the run shows is what
the stages will do: each layer's output is the next one's input, and what follows the last one means the same for any
batch (:mod:`.tail`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.skeleton import lacks_values, run_on_stand_ins, tensors_of
from pp_runtime.splitting.tail import Step, Tail, Value, can_be_repeated, numbers_of
from pp_runtime.splitting.unchanged import unchanged

SENT = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
"""Of which kinds are a layer's inputs that another stage can be sent."""


@dataclass(frozen=True, slots=True)
class Score:
    """What was learnt of a model."""

    given: Given
    """What the model was given."""
    layers: str
    """The name of the container."""
    names: tuple[str, ...]
    """Of the layers in it."""
    hidden: int | str
    """Where a layer takes the output of the one before: a position or a keyword."""
    returns: tuple[Any, ...] | None
    """What a layer returns after the hidden state: constants; None where it returns that alone."""
    before: frozenset[str]
    """Names of the modules that are called before the first layer."""
    tails: Mapping[bool, Tail | PipelineUsageError]
    """In training and in evaluation; or why there is none."""

    @property
    def modules_after(self) -> set[str]:
        """Names of the modules that are called after the last layer."""
        return {name for tail in self.tails.values() if isinstance(tail, Tail) for name in tail.modules}

    def tail(self, training: bool) -> Tail:
        """PipelineUsageError where the model cannot be cut in this mode."""
        found = self.tails[training]
        if isinstance(found, Tail):
            return found
        raise found

    def __deepcopy__(self, _: Any) -> Score:  # by copies of the stages that hold it
        return self


@dataclass
class _Watched:
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[tuple[Step, Any]] = field(default_factory=list)
    """With what each was given in the place of what it will be given, and what it returned."""


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
    """Run the model once, and once in the other of training and evaluation; learn how to cut it between its layers.

    A model with parameters on the meta device is run on stand-ins for all that it has and is given. Raises
    PipelineUsageError, which says what it saw, for a model whose layers do not follow one another, or of which stages
    would do something otherwise.
    """
    watch = partial(_rehearse, layers=layers)
    return run_on_stand_ins(watch, model, args, kwargs) if lacks_values(model) else watch(model, args, kwargs)


def _rehearse(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], layers: str | None) -> Score:
    container_name, container = find_layers(model, layers)
    _check_hooks(model, container_name)
    names = tuple(container._modules)
    watched, result = _run(model, container_name, list(container.children()), args, kwargs)
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
    tail = _tail(model, watched, result)
    return Score(
        given=given_of(args, kwargs),
        layers=container_name,
        names=names,
        hidden=hidden,
        returns=_beside_hidden(container_name, watched),
        before=frozenset(watched.before),
        tails={model.training: tail, not model.training: _tail_in_other_mode(model, args, kwargs, container_name)},
    )


def _tail_in_other_mode(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], container: str
) -> Tail | PipelineUsageError:
    modes = [(module, module.training) for module in model.modules()]
    training = not model.training
    try:
        for module, _ in modes:
            module.training = training
        layers = list(model.get_submodule(container).children())
        return _tail(model, *_run(model, container, layers, args, kwargs))
    except Exception as error:  # of no matter, unless the stages are run like this
        mode = "training" if training else "evaluation"
        return PipelineUsageError(f"the stages were not made for {mode}, where their model's example failed: {error}")
    finally:
        for module, was_training in modes:
            module.training = was_training


def _beside_hidden(container: str, watched: _Watched) -> tuple[Any, ...] | None:
    found = set()
    for number, output in enumerate(watched.outputs):
        others = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
        if tensors_of(others):
            raise PipelineUsageError(
                f"layer {number} of {container} returns tensors beside the hidden state, which other stages are not "
                "sent: turn off what makes them, or split the model with pipeline()"
            )
        found.add(others)
    if len(found) != 1:
        raise PipelineUsageError(f"the layers of {container} do not return the same beside the hidden state")
    return found.pop()


Given = tuple[tuple[str, ...], frozenset[tuple[str, str]]]
"""Of positional inputs, and of keywords that are not None: what each is, or its value where it is no tensor."""


def given_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """A model may do otherwise for another number or switch, which a stage far from its inputs would not know."""
    named = frozenset((name, _described(value)) for name, value in kwargs.items() if value is not None)
    return tuple(map(_described, args)), named


def _described(value: Any) -> str:
    return repr(tree_map(_Shown, value))


class _Shown:
    """In a nest that is printed."""

    def __init__(self, value: Any) -> None:
        kind = "tensor" if isinstance(value, Tensor) else type(value).__name__
        self._text = f"a {kind}" if isinstance(value, Tensor) or not isinstance(value, SENT) else repr(value)

    def __repr__(self) -> str:
        return self._text


def describe_given(given: Given) -> str:
    positional, keywords = given
    return ", ".join([*positional, *(f"{name}={value}" for name, value in sorted(keywords))]) or "nothing"


def first_of(output: Any) -> Any:
    """The hidden state in what a layer returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _around(model: nn.Module, container: str) -> dict[str, nn.Module]:
    """The modules that the layers are in, by name: the model, the container and what is between."""
    return {
        name: module for name, module in model.named_modules() if not name or f"{container}.".startswith(f"{name}.")
    }


def _check_hooks(model: nn.Module, container: str) -> None:
    for name, module in _around(model, container).items():
        for kind in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if getattr(module, kind):
                raise PipelineUsageError(
                    f"{name or 'the model'} has a hook ({kind.strip('_').replace('_', ' ')[:-1]}), and no stage is all "
                    "of it: remove it, or register it on the modules of the stages"
                )


class _Watching(TorchFunctionMode):
    """Watches a forward from outside of the layers and of what comes after the last."""

    def __init__(self, model: nn.Module, container: str, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.watched = _Watched()
        self._container, self._layers = container, list(layers)
        self._inside = 0  # of a layer, or of another module that is not around them
        self._over = False
        self._seen: dict[int, tuple[Tensor, int]] = {}
        self._outputs: dict[int, Tensor] = {}  # of layers, and what is computed of them between the layers
        self._modes = _Modes.now(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        of_layers = {id(part) for layer in layers for part in layer.modules()} - set(map(id, layers))
        around = {id(module) for module in _around(model, container).values()}
        self._handles = [
            handle
            for module in model.modules()
            if id(module) not in of_layers | around
            for handle in (
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, with_kwargs=True),
            )
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def check_unchanged(self, where: str) -> None:
        """Refuse a model that changes in place what layers take or give, while none of its modules runs."""
        for tensor, version in self._seen.values():
            if tensor._version != version:
                raise PipelineUsageError(
                    f"the model changes a tensor in place between the layers of {self._container} or after them, "
                    f"outside of a module and before {where}: split the model with pipeline()"
                )

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if not self._inside:
            self.check_unchanged(self._names[id(module)])
            if self._over or self._is_layer(module):
                self._modes.check(self._names[id(module)])
        self._inside += 1

    def _is_layer(self, module: nn.Module) -> bool:
        return any(module is layer for layer in self._layers)

    def _leave(self, module: nn.Module, given: Any, named: Any, output: Any) -> None:
        self._inside -= 1
        watched = self.watched
        if self._is_layer(module):
            self._check_given(self._names[id(module)], (given, named))
            watched.inputs.append((given, named))
            watched.outputs.append(output)
            self._over = self._over or module is self._layers[-1]
        elif self._over and not self._inside:
            watched.after.append((Step(self._names[id(module)], given, named), output))
        elif not watched.inputs:
            watched.before.append(self._names[id(module)])
        if not self._inside and watched.inputs:
            self._note((given, named, output))
            self._follow((given, named), output, made_by_layer=self._is_layer(module))

    def _follow(self, given: Any, output: Any, *, made_by_layer: bool = False) -> None:
        """Know what comes of a layer's output before the next ones."""
        if not self._over and (made_by_layer or any(id(leaf) in self._outputs for leaf in tensors_of(given))):
            self._outputs.update({id(tensor): tensor for tensor in tensors_of(output)})

    def _check_given(self, name: str, given: Any) -> None:
        before = first_of(self.watched.outputs[-1]) if self.watched.outputs else None
        for leaf in tensors_of(given):
            if id(leaf) in self._outputs and not _same(leaf, before):
                raise PipelineUsageError(
                    f"the model computes something between its layers, or hands on what earlier ones returned: {name} "
                    "is given what its stage would not know. Split the model with pipeline()"
                )

    def _note(self, nest: Any) -> None:
        # What modules themselves change they change again on their stage.
        known = [tensor for tensor, _ in self._seen.values()]
        self._seen = {id(tensor): (tensor, tensor._version) for tensor in (*known, *tensors_of(nest))}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if self._inside or not self.watched.inputs:
            return func(*args, **named)
        if getattr(func, "__name__", "") in _LOOKS_AT_VALUES:
            raise PipelineUsageError(
                f"the model looks at a value of the batch between the layers of {self._container} or after them, which "
                "may decide what it does: split the model with pipeline()"
            )
        result = func(*args, **named)
        self._follow((args, named), result)
        if self._over and isinstance(result, Tensor) and self._modes.change() is None:
            self.watched.after.append((Step(func, args, named), result))
        return result


_LOOKS_AT_VALUES = frozenset(
    ("__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy", "equal", "allclose")
)


@dataclass(frozen=True, slots=True)
class _Modes:
    """What of torch's state a forward may change for a part of the model."""

    records: bool
    autocast: Mapping[str, torch.dtype | None]

    @staticmethod
    def now(model: nn.Module) -> _Modes:
        kinds = {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}
        return _Modes(torch.is_grad_enabled(), {kind: _autocast_dtype(kind) for kind in kinds})

    def change(self) -> str | None:
        """What is no longer so."""
        if torch.is_grad_enabled() != self.records:
            return "records no gradients"
        if any(_autocast_dtype(kind) != dtype for kind, dtype in self.autocast.items()):
            return "changes autocast"
        return None

    def check(self, where: str) -> None:
        """Stages run their parts as their caller says."""
        change = self.change()
        if change is not None:
            raise PipelineUsageError(
                f"the model {change} around {where}, which its stages would not: do so around the whole step, or "
                "split the model with pipeline()"
            )


def _autocast_dtype(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _run(
    model: nn.Module, container: str, layers: Sequence[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[_Watched, Any]:
    # With gradients, so that parts without them are seen; what they would be computed from is not kept.
    nothing_kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
    with (
        unchanged([model]),
        torch.enable_grad(),
        nothing_kept,
        contextlib.closing(_Watching(model, container, layers)) as watching,
    ):
        with watching:
            result = model(*args, **kwargs)
        watching.check_unchanged("its end")
    return watching.watched, result


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


def _tail(model: nn.Module, watched: _Watched, result: Any) -> Tail:
    values = [first_of(watched.outputs[-1])]
    constants = numbers_of(model)
    steps = []
    for step, output in watched.after:
        if isinstance(step.what, str):
            steps.append(_with_values(step, values))
        elif can_be_repeated(step.what, step.args, step.kwargs, constants):
            with contextlib.suppress(PipelineUsageError):
                steps.append(_with_values(step, values))
        if len(steps) == len(values):
            values.append(output)
        # What a function gives that cannot be repeated is of no matter, unless it is used.
    leaves, structure = tree_flatten(result)
    for leaf in leaves:
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            raise PipelineUsageError(
                f"the model returns the number {leaf!r}, which may be of this batch alone: return a tensor"
            )
    results = [
        Value(_number_of(leaf, values, "the model returns")) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]
    return Tail(tuple(steps), tuple(results), structure)


def _with_values(step: Step, values: Sequence[Any]) -> Step:
    leaves, structure = tree_flatten((step.args, dict(step.kwargs)))
    if isinstance(step.what, str) and len(leaves) != 1:
        raise PipelineUsageError(f"{step.what} is called after the last layer with more than one input: use pipeline()")
    what = f"{step.what} is called with"
    known = [Value(_number_of(leaf, values, what)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(known, structure)
    return Step(step.what, args, kwargs)


def _number_of(value: Any, values: Sequence[Any], what: str) -> int:
    for number, known in reversed(list(enumerate(values))):
        if isinstance(known, Tensor) and _same(value, known):
            return number
    raise PipelineUsageError(
        f"{what} a value that is computed after the last layer outside of a module, and not in a way that is sure to "
        "mean the same for other batches: split the model with pipeline()"
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
        and (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
    )
