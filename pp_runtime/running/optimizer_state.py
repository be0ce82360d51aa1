"""An optimizer's state under the names of an unsplit model, flat, so that other ranks and schedules can read it.

    state.layers.0.weight.exp_avg       a tensor, as the optimizer has it
    param_groups.layers.0.weight.lr     the options of the group that the parameter is in
    has_state.layers.0.weight           0 where the optimizer has made none yet
    optimizer                           the name of its class

It is the form that torch.distributed.checkpoint.state_dict flattens to, with two kinds of keys more. Torch's functions
make a first step where none was made, which the optimizer counts: what is saved before the first step then goes wrong.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pp_runtime.errors import PipelineUsageError
from pp_runtime.running.values import is_dtensor

_STATE, _GROUPS, _HAS_STATE, _CLASS = "state", "param_groups", "has_state", "optimizer"
_NO_OPTIONS = ("params", "param_names")
_LEAVES = (Tensor, bool, int, float, str, type(None))

Names = Mapping[nn.Parameter, str]


def optimizer_state(optimizer: Optimizer, names: Names) -> dict[str, Any]:
    """The state of an optimizer, by the names of its parameters. Its tensors are the optimizer's own.

    A parameter that takes gradients and has no state yet is given the state that a first step would begin with, so that
    the keys do not depend on when this is called; ``has_state`` tells. The optimizer is not changed.
    """
    _check_names(optimizer, names)
    found: dict[str, Any] = {_CLASS: _class_of(optimizer)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            has_state = bool(optimizer.state.get(parameter))
            found[f"{_HAS_STATE}.{name}"] = int(has_state)
            for key, value in _options(group).items():
                if not _equal(found.setdefault(f"{_GROUPS}.{name}.{key}", value), value):
                    raise PipelineUsageError(
                        f"{name} is tied, and its copies are in groups of the optimizer with other {key}"
                    )
            if has_state or parameter.requires_grad:
                state = optimizer.state[parameter] if has_state else _first_state(optimizer, group, parameter)
                found |= _flat(f"{_STATE}.{name}", state)
    return found


def load_optimizer_state(optimizer: Optimizer, names: Names, state: Mapping[str, Any]) -> None:
    """Put the state of some or all of a model's parameters into an optimizer of this rank's.

    Tensors are copied. Raises PipelineUsageError, before anything is changed, for a state that lacks a parameter, is of
    another class or other options, or does not fit.
    """
    _check_names(optimizer, names)
    written_by = state.get(_CLASS, _class_of(optimizer))
    if written_by != _class_of(optimizer):
        raise PipelineUsageError(
            f"the state is that of {written_by}, and the optimizer is {_class_of(optimizer)}: make one of that class"
        )
    given = _by_name(state, {names[parameter] for parameter in _parameters(optimizer)})
    groups, states = [], {}
    for group in optimizer.param_groups:
        options = _options_given([names[parameter] for parameter in group["params"]], group, given)
        groups.append(options)
        for parameter in group["params"]:
            states[parameter] = _state_given(optimizer, {**group, **options}, parameter, names[parameter], given)
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update(options)
    for parameter, loaded in states.items():
        if loaded:
            optimizer.state[parameter] = loaded
        else:
            optimizer.state.pop(parameter, None)


Given = Mapping[tuple[str, str], Mapping[str, Any]]
"""What a state holds, by the kind of the key and the parameter's name."""


def _by_name(state: Mapping[str, Any], names: set[str]) -> Given:
    given: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for key, value in state.items():
        kind, _, rest = key.partition(".")
        parts = rest.split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            if name in names:
                given[kind, name][".".join(parts[end:])] = value
                break
    return given


def _options_given(names: Sequence[str], group: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """The options of a group, on which all its parameters must agree."""
    found: dict[str, Any] = {}
    for name in names:
        options = given.get((_GROUPS, name))
        if options is None:
            raise PipelineUsageError(
                f"the state lacks {name}, which the optimizer holds: it must be one of an optimizer that held it, too"
            )
        missing = sorted(_options(group).keys() - options.keys())
        if missing:
            raise PipelineUsageError(f"the state lacks the option {missing[0]} of {name}: it is of another optimizer")
        for key, value in options.items():
            if not _equal(found.setdefault(key, value), value):
                raise PipelineUsageError(
                    f"{names[0]} and {name} are in one group of the optimizer, and the state has other options for "
                    f"them: {key} is {found[key]} and {value}. Put the parameters into the groups that they were in"
                )
    return {key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in found.items()}


def _state_given(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter, name: str, given: Given
) -> dict[str, Any]:
    """A parameter's state, nested and placed as the optimizer would make it with the options of ``group``."""
    leaves = given.get((_STATE, name), {})
    if not given.get((_HAS_STATE, name), {"": bool(leaves)})[""]:
        return {}
    likeness = _likeness(optimizer, group, parameter)
    expected = _flat("", likeness)
    if expected.keys() != leaves.keys():
        raise PipelineUsageError(
            f"the state of {name} is {_listed(leaves)}, and the optimizer keeps {_listed(expected)}: make it of the "
            "class and with the options that it had, of parameters that take gradients as they did"
        )
    for key, value in leaves.items():
        _check_value(f"{key} of {name}", value, expected[key])
    return _nested(likeness, "", leaves)


def _likeness(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> Any:
    """A state such as the parameter's, with other values."""
    own = optimizer.state.get(parameter)
    try:
        return _first_state(optimizer, group, parameter)
    except PipelineUsageError:
        if own:  # made by its constructor
            return own
        raise


def _first_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimizer would keep of a parameter, zero or as small as it begins: made by a step of a stand-in.

    A step counter in it is set back to 0. Neither the parameter nor the optimizer is touched, nor are its hooks called.
    """
    stand_in = nn.Parameter(torch.zeros_like(parameter), requires_grad=True)
    stand_in.grad = torch.zeros_like(stand_in)
    double = object.__new__(type(optimizer))
    own = {name: value for name, value in vars(optimizer).items() if name != "step"}  # a scheduler's
    hooks: dict[str, Any] = {name: OrderedDict() for name in own if name.endswith("_hooks")}
    options = copy.deepcopy(_options(group))
    vars(double).update(own | hooks | {"state": defaultdict(dict), "param_groups": [{**options, "params": [stand_in]}]})
    try:
        double.step()
    except Exception as error:
        raise PipelineUsageError(
            f"a {type(optimizer).__name__} does not say what it keeps of a parameter: its step failed for one without "
            f"gradients ({type(error).__name__}: {error})"
        ) from error
    state = dict(double.state.get(stand_in, {}))
    if "step" in state:
        state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0
    return state


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        if not isinstance(value, _LEAVES):
            raise PipelineUsageError(
                f"{prefix} is a {type(value).__name__}, which no other layout could read: states are tensors, numbers "
                "and dicts of them"
            )
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(f"{prefix}.{name}" if prefix else str(name), part).items()
    }


def _nested(likeness: Any, prefix: str, leaves: Mapping[str, Any]) -> Any:
    """The leaves in the form of the likeness, with memory of their own, on its device."""
    if isinstance(likeness, Mapping):
        return {
            name: _nested(part, f"{prefix}.{name}" if prefix else str(name), leaves) for name, part in likeness.items()
        }
    value = leaves[prefix]
    return value.detach().to(likeness.device, copy=True) if isinstance(value, Tensor) else value


def _check_value(what: str, value: Any, expected: Any) -> None:
    if isinstance(value, Tensor) != isinstance(expected, Tensor):
        raise PipelineUsageError(
            f"{what} is a {type(value).__name__} in the state, and the optimizer keeps a {type(expected).__name__}"
        )
    if not isinstance(value, Tensor):
        return
    if _layout(value) != _layout(expected):
        raise PipelineUsageError(
            f"{what} is sharded otherwise in the state ({_layout(value)}) than here ({_layout(expected)}): load it by "
            "torch.distributed.checkpoint, which lays it anew: dcp.load({..., pipeline.stateful(optimizer)}, ...)"
        )
    for kind in ("shape", "dtype"):
        one, other = getattr(value, kind), getattr(expected, kind)
        if one != other:
            raise PipelineUsageError(f"the {kind} of {what} is {one} in the state, and {other} in the optimizer")


def _layout(tensor: Tensor) -> str:
    return f"{tensor.placements} on {tensor.device_mesh}" if is_dtensor(tensor) else "whole"


def _check_names(optimizer: Optimizer, names: Names) -> None:
    for number, parameter in enumerate(_parameters(optimizer)):
        if parameter not in names:
            raise PipelineUsageError(
                f"parameter {number} of the optimizer, of shape {tuple(parameter.shape)}, is none of this pipeline's: "
                "make the optimizer of pipeline.parameters()"
            )


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _NO_OPTIONS}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _class_of(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _listed(leaves: Mapping[str, Any]) -> str:
    return ", ".join(sorted(leaves)) or "nothing"
