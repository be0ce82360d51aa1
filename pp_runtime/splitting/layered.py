"""Stages of a model whose layers stand in a row, without a tracer: the model itself, with what each does not run gone.

    stage 0         the model's own forward up to the first layer of another stage; what that and all later layers
                    would be given goes along
    stage i         its layers, one after the other
    the last        its layers, and the modules that the model calls after them

Modules and parameters keep the model's names, so a checkpoint of the model fits the stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.loading import load_weights
from pp_runtime.splitting.rehearsal import Score, describe_given, first_of, given_of, rehearse
from pp_runtime.splitting.skeleton import lacks_values, skeleton
from pp_runtime.splitting.weights import open_weights
from pp_runtime.stage import PipelineStage

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is given beside the hidden state: positional inputs, of which that one is None, and keywords."""


def layer_stages(
    model: nn.Module,
    sizes: Sequence[int],
    stages: Sequence[int],
    device: torch.device | str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    layers: str | None = None,
    group: dist.ProcessGroup | None = None,
    weights: Any = None,
    parallelize: Callable[[nn.Module], nn.Module | None] | None = None,
) -> list[PipelineStage]:
    """The pipeline stages of a rank, cut out of a whole model whose layers stand in a list or dict.

    Args:
        model: on any device. It is run once, with ``args`` and ``kwargs``, to see how its values go; then each stage
            gets its part, moved to ``device``. On the meta device (:func:`pp_runtime.without_weights`) it is run
            without values, nothing of it is ever whole in memory, and ``weights`` are needed.
        sizes: how many layers each stage has, as :func:`pp_runtime.partition` gives them.
        stages: the stages to make, as :func:`pp_runtime.stages_of_rank` gives them.
        args, kwargs: an example of the model's inputs, of any batch size.
        layers: the name of the container, if it is not the longest one.
        weights: where the whole model's weights are, of which those of the stages are read: a file, a folder, a
            mapping or a function, as :func:`pp_runtime.open_weights` takes them. :func:`pp_runtime.load_weights` says
            how they are checked. If not given, the model's own values are used.
        parallelize: called with each stage's module, once it has its weights, to wrap, shard or compile it; may return
            another.

    The first stage takes the model's inputs, the same ones by name as in the example; the last one returns what the
    model returns. Parameters that stages share (an embedding and a head) are tied. Raises
    PipelineUsageError, which says why, for a model that cannot be cut like this; :func:`pp_runtime.pipeline` traces
    such models.
    """
    if weights is None and lacks_values(model):
        raise PipelineUsageError(
            "the model is on the meta device, where its parameters have no values: give weights=, where those of the "
            "whole model are"
        )
    source = None if weights is None else open_weights(weights)
    modules = layer_modules(model, sizes, stages, args, kwargs, layers=layers)
    if source is not None:
        load_weights([module for module, _ in modules.values()], source, model=model, device=device)
    made = []
    for index, (module, ties) in modules.items():
        module = module.to(device)
        wrapped = None if parallelize is None else parallelize(module)
        module = module if wrapped is None else wrapped  # a compiled one has no truth value
        stage = PipelineStage(module, index, len(sizes), torch.device(device), group=group)
        for name in ties:
            stage.tie(name, name_of_tie(model, name))
        made.append(stage)
    return made


def name_of_tie(model: nn.Module, name: str) -> str:
    """The same label on each stage: the first name that the shared parameter has in the whole model."""
    parameter = model.get_parameter(name)
    return next(each for each, other in model.named_parameters() if other is parameter)


def layer_modules(
    model: nn.Module,
    sizes: Sequence[int],
    stages: Sequence[int],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    layers: str | None = None,
) -> dict[int, tuple[nn.Module, list[str]]]:
    """For each of the stages its module, and the names of its parameters that are tied. See :func:`layer_stages`.

    Modules of one rank that are tied share the parameter itself, until one of them is sharded.
    """
    score = rehearse(model, args, kwargs or {}, layers)
    sizes = list(sizes)
    if sum(sizes) != len(score.names) or min(sizes, default=0) < 0:
        raise PipelineUsageError(
            f"the sizes {sizes} are those of {sum(sizes)} layers, and {score.layers} has {len(score.names)}"
        )
    if sizes[0] < 1 and len(sizes) > 1:
        raise PipelineUsageError("the first stage needs a layer: what the layers are given is made there")
    wrong = [index for index in stages if not 0 <= index < len(sizes)]
    if wrong:
        raise PipelineUsageError(f"there is no stage {wrong[0]}: the sizes are those of {len(sizes)} stages")
    if len(sizes) == 1:
        return {0: (model, [])} if stages else {}
    ends = list(accumulate(sizes))
    held = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    last = len(sizes) - 1
    modules = {0: _first_stage(model, score, held[0])}
    for index in {last, *stages} - {0}:  # the first and the last one on every rank, to see what others share with them
        modules[index] = _later_stage(model, score, held[index], is_last=index == last)
    row = list(model.get_submodule(score.layers).children())
    holders = Counter(
        parameter
        for index, numbers in enumerate(held)
        for parameter in set(_parameters_of([modules[index]] if index in modules else [row[each] for each in numbers]))
    )
    shared = {parameter for parameter, count in holders.items() if count > 1}
    return {
        index: (modules[index], [name for name, each in modules[index].named_parameters() if each in shared])
        for index in stages
    }


def _parameters_of(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    for module in modules:
        yield from module.parameters()


_NOT_AS_SEEN = (
    "the model did not call each of its layers once, as it did when the stages were made (does it leave layers out at "
    "random?): split it with pipeline()"
)


class _Beyond(nn.Module):
    """Stands on the first stage for a module that is called after the last layer, and so is never called there."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise PipelineUsageError(_NOT_AS_SEEN)


class _Left(Exception):
    """The model's own forward has come to what other stages do."""

    hidden: Tensor


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    """A hook of the last layer, where no other stage has one."""
    left = _Left()
    left.hidden = first_of(output)
    raise left


class _Recorder(nn.Module):
    """Stands for a layer of another stage: notes what that would be given, and passes the hidden state on."""

    def __init__(self, layer: nn.Module, score: Score, is_last: bool) -> None:
        super().__init__()
        # Models ask their layers for what they are, such as the kind of mask that they take.
        known = {name: value for name, value in vars(layer).items() if name not in self.__dict__}
        self.__dict__.update({name: value for name, value in known.items() if not getattr(value, "is_meta", False)})
        self._stands_for = type(layer)
        self._score, self._is_last = score, is_last
        self._calls: list[tuple[Tensor, Call]] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self).get("_stands_for"), name, None)
        return value if value is not None and not callable(value) else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = _taken_out(self._score, args, kwargs)
        self._calls.append((hidden, call))
        if self._is_last:
            raise _Left
        return hidden if self._score.returns is None else (hidden, *self._score.returns)


def _taken_out(score: Score, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if isinstance(score.hidden, int):
        return args[score.hidden], ((*args[: score.hidden], None, *args[score.hidden + 1 :]), kwargs)
    return kwargs[score.hidden], (args, kwargs | {score.hidden: None})


def _put_in(score: Score, hidden: Tensor, call: Call) -> Call:
    args, kwargs = call
    if isinstance(score.hidden, int):
        return (*args[: score.hidden], hidden, *args[score.hidden + 1 :]), kwargs
    return args, {**kwargs, score.hidden: hidden}


class _First(nn.Module):
    """In front of the model's own class: its forward, left where the first layer of another stage would be called."""

    _recorders: list[_Recorder]
    _score: Score

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = given_of(args, kwargs)
        if given != self._score.given:
            raise PipelineUsageError(
                f"the stages were made for a model that is given {describe_given(self._score.given)}, and it is given "
                f"{describe_given(given)}: what it does then was not seen. Make them with such an example"
            )
        for recorder in self._recorders:
            recorder._calls = []
        try:
            super().forward(*args, **kwargs)
        except _Left as left:
            if not self._recorders:
                return {"hidden": left.hidden, "variants": (), "which": ()}
            if all(len(recorder._calls) == 1 for recorder in self._recorders):
                return _message([recorder._calls.pop() for recorder in self._recorders])
        raise PipelineUsageError(_NOT_AS_SEEN)


def _message(calls: Sequence[tuple[Tensor, Call]]) -> dict[str, Any]:
    """The hidden state, and for each layer to come which of the different calls it is given."""
    numbers: dict[Any, int] = {}
    variants: list[Call] = []
    which = []
    for _, call in calls:
        leaves, structure = tree_flatten(call)
        key = (structure, *(id(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves))
        if key not in numbers:
            numbers[key] = len(variants)
            variants.append(call)
        which.append(numbers[key])
    return {"hidden": calls[0][0], "variants": tuple(variants), "which": tuple(which)}


class _Later(nn.Module):
    """In front of the model's own class: some of its layers, and where it is the last stage what comes after them."""

    _score: Score
    _held: range
    _is_last: bool

    def forward(self, message: dict[str, Any], **_: Any) -> Any:
        """The keywords are the first stage's, where a rank holds both."""
        score, hidden, which = self._score, message["hidden"], message["which"]
        for number, layer in zip(which, self._held, strict=False):
            args, kwargs = _put_in(score, hidden, message["variants"][number])
            hidden = first_of(self.get_submodule(f"{score.layers}.{score.names[layer]}")(*args, **kwargs))
        if not self._is_last:
            return {"hidden": hidden, "variants": message["variants"], "which": which[len(self._held) :]}
        return score.tail(self.training).run(hidden, self)


def _first_stage(model: nn.Module, score: Score, held: range) -> nn.Module:
    made = skeleton(model)
    container = made.get_submodule(score.layers)
    recorders = []
    for number in range(held.stop, len(score.names)):
        name = score.names[number]
        layer = container._modules[name]
        assert layer is not None
        recorders.append(_Recorder(layer, score, is_last=number == len(score.names) - 1))
        container._modules[name] = recorders[-1]
    if not recorders:
        made.get_submodule(f"{score.layers}.{score.names[-1]}").register_forward_hook(_leave)
    for name in score.modules_after:
        if name not in score.before:
            parent, _, child = name.rpartition(".")
            made.get_submodule(parent)._modules[child] = _Beyond()
    made.__class__ = type(f"First{type(model).__name__}", (_First, type(model)), {})
    made._recorders, made._score = recorders, score  # type: ignore[assignment]
    return made


def _later_stage(model: nn.Module, score: Score, held: range, is_last: bool) -> nn.Module:
    kept = {f"{score.layers}.{score.names[number]}" for number in held}
    if is_last:
        kept.update(score.modules_after)
    made = skeleton(model)
    _keep_only(made, "", kept)
    made._forward_pre_hooks.clear()  # for the model's inputs
    made.__class__ = type(f"Later{type(model).__name__}", (_Later, type(model)), {})
    made._score, made._held, made._is_last = score, held, is_last  # type: ignore[assignment]
    return made


def _keep_only(module: nn.Module, prefix: str, kept: set[str]) -> None:
    """Take out every module that is not kept, in one that is kept, or on the way to one; and what shells hold."""
    module._parameters.clear()
    module._buffers.clear()
    for name, child in list(module._modules.items()):
        full = f"{prefix}{name}"
        if full in kept or child is None:
            continue
        if any(each.startswith(f"{full}.") for each in kept):
            _keep_only(child, f"{full}.", kept)
        elif isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            del module._modules[name]
        else:
            module._modules[name] = None
