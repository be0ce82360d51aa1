"""Modules filled from a checkpoint of the whole model: nothing is changed before every tensor was checked."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.weights import Weights, open_weights

_SHOWN = 3  # names of a long list


def load_weights(
    module: nn.Module | Iterable[nn.Module],
    weights: Any,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fill the parameters and persistent buffers of a module, or of several, from a checkpoint.

    Only their tensors are read. What is on the meta device gets memory on ``device``; all else is filled where it is.
    The parameters stay the same objects, so what is shared stays shared, optimizers keep them, and ``requires_grad`` is
    as it was. Values are cast to the module's floating dtype, as ``Tensor.to`` does.

    Args:
        weights: a path, a mapping or a function, as :func:`pp_runtime.open_weights` takes them, or what it gives.
        model: the whole model that the modules were cut out of: a parameter that it has under several names may be in
            the checkpoint under any of them, and the checkpoint may hold no names that it lacks.

    Raises PipelineUsageError, before anything is changed, for a name that the checkpoint lacks, a shape, a kind of
    numbers or a kind of tensor that differs, a name that the model lacks, and a buffer on the meta device that
    checkpoints do not hold. Call it before a module is sharded, wrapped or compiled.
    """
    source = open_weights(weights)
    modules = [module] if isinstance(module, nn.Module) else list(module)
    _check_fillable(modules)
    wanted = {id(tensor): tensor for module in modules for tensor in _state(module).values()}
    aliases = _names_of_each(modules if model is None else [model, *modules])
    found = source.read(dict.fromkeys(name for key in wanted for name in aliases[key]))
    missing = [next(iter(aliases[key])) for key in wanted if not any(name in found for name in aliases[key])]
    if missing:
        raise PipelineUsageError(_lacks(missing, source))
    if model is not None:
        _check_no_more(model, source)
    values = _values(wanted, aliases, found, source)
    del found  # so that each tensor goes when its values are copied
    with torch.no_grad():
        for key in list(values):
            _fill(next(iter(aliases[key])), wanted[key], values.pop(key), torch.device(device))


def _names_of_each(modules: Sequence[nn.Module]) -> dict[int, dict[str, None]]:
    """The names of each tensor, which is told by its identity, from first to last."""
    names: dict[int, dict[str, None]] = {}
    for module in modules:
        for name, tensor in _state(module).items():
            names.setdefault(id(tensor), {})[name] = None
    return names


def _state(module: nn.Module) -> dict[str, Any]:
    return module.state_dict(keep_vars=True)


def _check_fillable(modules: Sequence[nn.Module]) -> None:
    memory: dict[Any, tuple[str, Tensor]] = {}
    for module in modules:
        for name, tensor in _state(module).items():
            if not isinstance(tensor, Tensor):
                raise PipelineUsageError(f"{name} is a state of the module's own: fill it by load_state_dict")
            objection = _unusual(tensor)
            if objection:
                raise PipelineUsageError(
                    f"{name} of the module {objection}: load the weights before it is sharded, wrapped or quantised"
                )
            if tensor.is_meta and tensor.numel():
                other, sharer = memory.setdefault(tensor.untyped_storage()._cdata, (name, tensor))
                if sharer is not tensor:
                    raise PipelineUsageError(
                        f"{name} and {other} look at the same memory, which tensors on the meta device cannot keep: "
                        "make them one parameter"
                    )
        _check_no_lost_values(module)


def _check_no_lost_values(module: nn.Module) -> None:
    held = {id(tensor) for tensor in _state(module).values()}
    lost = [name for name, tensor in _all_tensors(module) if tensor.is_meta and id(tensor) not in held]
    if lost:
        raise PipelineUsageError(
            f"{_shown(lost)} on the meta device, where it has no values, and no checkpoint holds it: make the model "
            "in without_weights(), which leaves buffers as they are, instead of torch.device('meta')"
        )


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, persistent or not, and tensors that are plain attributes."""
    for prefix, part in module.named_modules():
        for name, value in (*part._buffers.items(), *vars(part).items()):
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}" if prefix else name, value


def _check_no_more(model: nn.Module, source: Weights) -> None:
    more = sorted(set(source.names() or ()) - _state(model).keys())
    if more:
        raise PipelineUsageError(
            f"{source.description} has {len(more)} names that the model does not, {_shown(more)}: it is of another "
            "model. If they are not needed, leave them out: open_weights(weights, rename=...), with a function that "
            "returns None for them and other names as they are"
        )


def _values(
    wanted: Mapping[int, Tensor], aliases: Mapping[int, Mapping[str, None]], found: Mapping[str, Any], source: Weights
) -> dict[int, Tensor]:
    """For each tensor its values, checked."""
    values = {}
    for key, tensor in wanted.items():
        there = [name for name in aliases[key] if name in found]
        for name in there:
            _check_value(name, found[name], tensor, source)
        for other in there[1:]:
            if not _same(found[there[0]], found[other]):
                raise PipelineUsageError(
                    f"{there[0]} and {other} are one parameter of the model, and {source.description} has two that "
                    "differ: untie them in the model (for transformers, tie_word_embeddings=False)"
                )
        values[key] = found[there[0]].detach()
    return values


def _check_value(name: str, value: Any, tensor: Tensor, source: Weights) -> None:
    where = f"{name} in {source.description}"
    if not isinstance(value, Tensor):
        raise PipelineUsageError(f"{where} is a {type(value).__name__}, not a tensor")
    objection = _unusual(value) or ("is on the meta device, without values" if value.is_meta else None)
    if objection:
        raise PipelineUsageError(f"{where} {objection}: give it as a plain tensor")
    if value.shape != tensor.shape:
        raise PipelineUsageError(f"{where} has the shape {tuple(value.shape)}, and the model's {tuple(tensor.shape)}")
    if value.dtype != tensor.dtype and not _casts(value.dtype, tensor.dtype):
        raise PipelineUsageError(
            f"{where} has {value.dtype}, and the model's {tensor.dtype}: only floating numbers of 16 bits and more are "
            "cast, so make the model with this dtype, or give the values that are meant"
        )
    if value.dtype != tensor.dtype and tensor.dtype == torch.float16 and _overflows(value):
        raise PipelineUsageError(f"{where} has numbers too large for {tensor.dtype}, the model's: make it with another")


def _casts(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Narrower numbers and integers have scales, which a cast would leave out."""
    return all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in (given, wanted))


def _overflows(value: Tensor) -> bool:
    return bool((value.isfinite() & ~value.to(torch.float16).isfinite()).any())


def _unusual(tensor: Tensor) -> str | None:
    """Why values cannot simply be copied to or from it."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"is a {type(tensor).__name__}"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"is quantised or not dense ({tensor.layout})"
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one.to(other.dtype), other)


def _fill(name: str, tensor: Tensor, value: Tensor, device: torch.device) -> None:
    if tensor.is_meta:
        made: Tensor = torch.empty_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        vars(made).update(vars(tensor))
        try:
            swap_tensors(tensor, made)  # so that whatever holds the parameter has it filled
        except RuntimeError as error:
            raise PipelineUsageError(
                f"{name} cannot be given memory, as something still uses it ({error}): load the weights before the "
                "model is run or traced"
            ) from error
    tensor.copy_(value)


def _lacks(missing: Sequence[str], source: Weights) -> str:
    said = f"{source.description} lacks {len(missing)} names of the module, {_shown(missing)}"
    listed = source.names()
    return said if listed is None else f"{said}; {_mend(missing[0], listed)}"


def _mend(name: str, listed: Collection[str]) -> str:
    for other in sorted(listed):
        if other.endswith(f".{name}"):
            prefix = other.removesuffix(name)
            return f"it has {other}: open_weights(weights, rename=lambda name: name.removeprefix({prefix!r}))"
        if name.endswith(f".{other}"):
            prefix = name.removesuffix(other)
            return f"it has {other}: open_weights(weights, rename=lambda name: {prefix!r} + name)"
    near = difflib.get_close_matches(name, listed, _SHOWN) or sorted(listed)
    return f"it has {_shown(near)}" if near else "it has none at all"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")
