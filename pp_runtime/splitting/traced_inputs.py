"""Which input of a traced graph each argument of a call is: found by name, never by place in the graph.

    def forward(self, tokens, *, batch, scale=None)          the model's own signature
    pipeline(model, (tokens,), {"batch": {"mask": m, "ids": i}})

    "tokens" ─► graph input tokens     "batch['mask']" ─► batch_mask     "batch['ids']" ─► batch_ids     "scale" = None

A graph lists its inputs in the order of the example, and its stages in one of their own, so places mean nothing.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path

from pp_runtime.errors import PipelineUsageError

# What stands for a model input that the program did not give: a shape that no real one has.
_ABSENT = (0,) * 7


@dataclass(frozen=True)
class Signature:
    """The parameters of a model's ``forward``."""

    positional: tuple[str, ...]
    keyword: frozenset[str]  # what may be given by keyword
    more_positional: str | None  # the name after *
    more_keywords: bool  # whether there is a **
    defaults: Mapping[str, Any]

    @staticmethod
    def of(model: torch.nn.Module) -> Signature:
        """The signature of a module's forward."""
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = inspect.Parameter
        both = kinds.POSITIONAL_OR_KEYWORD
        return Signature(
            tuple(p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, both)),
            frozenset(p.name for p in parameters if p.kind in (kinds.KEYWORD_ONLY, both)),
            next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), None),
            any(p.kind is kinds.VAR_KEYWORD for p in parameters),
            {p.name: p.default for p in parameters if p.default is not kinds.empty},
        )

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Everything in the arguments of a call, by the path to it: ``tokens``, ``batch['mask']``, ``others[0]``."""
        named = dict(zip(self.positional, args, strict=False))
        surplus = tuple(args[len(self.positional) :])
        if surplus and self.more_positional is None:
            raise PipelineUsageError(
                f"the model takes {len(self.positional)} positional inputs ({', '.join(self.positional)}) but "
                f"{len(args)} were given: give it no more than that"
            )
        if surplus and self.more_positional is not None:
            named[self.more_positional] = surplus
        for name, value in kwargs.items():
            if name in named:
                raise PipelineUsageError(f"the model's input '{name}' was given twice, by position and by keyword")
            named[name] = value
        return {path: leaf for name, value in named.items() for path, leaf in _leaves(name, value)}


@dataclass(frozen=True)
class ModelInputs:
    """What a traced model takes: the graph input of each tensor, and what the trace took for a constant."""

    signature: Signature
    tensors: Mapping[str, str]  # path -> graph input
    constants: Mapping[str, Any]  # path -> value in the trace
    kinds: Mapping[str, tuple[torch.Size, torch.dtype]]  # path -> of the tensor in the trace

    @staticmethod
    def of(
        program: torch.export.ExportedProgram, model: torch.nn.Module, placeholders: Sequence[fx.Node]
    ) -> ModelInputs:
        """The inputs of an exported model; ``placeholders`` are its graph's, in the order of the call's leaves."""
        signature = Signature.of(model)
        specs = [
            spec.arg
            for spec in program.graph_signature.input_specs
            if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT
        ]
        args, kwargs = torch.utils._pytree.tree_unflatten(list(range(len(placeholders))), program.call_spec.in_spec)
        tensors: dict[str, str] = {}
        constants: dict[str, Any] = {}
        kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for path, place in signature.leaves(args, kwargs).items():
            if isinstance(specs[place], torch.export.graph_signature.ConstantArgument):
                constants[path] = specs[place].value
            else:
                tensors[path] = str(placeholders[place].target)
                kinds[path] = _kind(placeholders[place].meta["val"])
        return ModelInputs(signature, tensors, constants, kinds)

    def in_order(self) -> tuple[str, ...]:
        """The graph inputs as the model's signature lists them."""
        places = {name: place for place, name in enumerate(self.signature.positional)}
        return tuple(
            self.tensors[path]
            for path in sorted(self.tensors, key=lambda path: places.get(_argument(path), len(places)))
        )

    def given(self, stage: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call by graph input; the rest must fit the trace.

        Tensors that are missing are left out. Constants may be: the graph has them.
        """
        by_name: dict[str, Any] = {}
        direct: dict[str, torch.Tensor] = {}
        for name, value in kwargs.items():
            if name not in self.signature.keyword and name in self._graph_inputs and isinstance(value, torch.Tensor):
                direct[name] = value  # as torch names the parts of a container: batch_mask
            else:
                by_name[name] = value
        leaves = self.signature.leaves(args, by_name)
        for path, value in leaves.items():
            if path in self.tensors:
                if not isinstance(value, torch.Tensor):
                    raise PipelineUsageError(
                        f"stage {stage}: the model was traced with a tensor as '{path}' and is given {value!r}: "
                        "give it a tensor, or trace the model again"
                    )
                direct[self.tensors[path]] = value
                if _kind(value) != self.kinds[path]:
                    self._warn(stage, path, value)
            else:
                self._check_constant(stage, path, value)
        return direct

    def _warn(self, stage: int, path: str, value: torch.Tensor) -> None:
        shape, dtype = self.kinds[path]
        warnings.warn(
            f"stage {stage}: the model was traced with '{path}' of shape {tuple(shape)} and {dtype} and is given "
            f"{tuple(value.shape)} and {value.dtype}. What its forward computed of sizes and dtypes is a constant in "
            "the trace, so the result may be another than the model's: give microbatches like mb_args and mb_kwargs, "
            "or trace the model again",
            stacklevel=2,
        )

    def _check_constant(self, stage: int, path: str, value: Any) -> None:
        if path in self.constants:
            if not _same(value, self.constants[path]):
                raise PipelineUsageError(
                    f"stage {stage}: the model was traced with {path}={self.constants[path]!r}, which the graph has as "
                    f"a constant, and is given {_brief(value)}: trace the model again with that"
                )
        elif path in self.signature.defaults:
            if not _same(value, self.signature.defaults[path]):
                raise PipelineUsageError(
                    f"stage {stage}: the model was traced without '{path}' and is given {_brief(value)}: "
                    "trace the model again with it in mb_args or mb_kwargs"
                )
        else:
            raise PipelineUsageError(
                f"stage {stage}: the traced model has no input '{path}'; its inputs are "
                f"{', '.join(repr(known) for known in (*self.tensors, *self.constants))}: "
                "name one of them, or trace the model again"
            )

    @property
    def _graph_inputs(self) -> frozenset[str]:
        return frozenset(self.tensors.values())

    def path_of(self, graph_input: str) -> str:
        """What a program calls a graph input."""
        return next(path for path, name in self.tensors.items() if name == graph_input)


@dataclass(frozen=True, eq=False)
class FirstStageInputs:
    """Makes the arguments of a step those of the first stage's graph."""

    inputs: ModelInputs
    takes: tuple[str, ...]  # the graph's inputs: what it uses, and what it hands to later stages
    uses: frozenset[str]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        given = self.inputs.given(0, args, kwargs)
        for name in self.takes:
            if name in self.uses and name not in given:
                raise _missing(self.inputs.path_of(name), 0, "pass it to step() on the rank of the first stage")
        device = next((value.device for value in given.values()), None)
        return tuple(given[name] if name in given else torch.empty(_ABSENT, device=device) for name in self.takes)


@dataclass(frozen=True, eq=False)
class LaterStageInputs:
    """Makes what a later stage receives, and the keyword inputs given on its rank, the arguments of its graph."""

    inputs: ModelInputs
    stage: int
    count: int  # of the graph's inputs
    roots: tuple[tuple[int, str], ...]  # which of them are inputs of the model, that the first stage sends on

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        if len(args) != self.count:
            raise PipelineUsageError(
                f"stage {self.stage} was given {len(args)} positional inputs and its graph takes {self.count}"
            )
        given = self.inputs.given(self.stage, (), kwargs) if kwargs else {}
        if not self.roots:
            return args
        values = list(args)
        for position, name in self.roots:
            if name in given:
                values[position] = given[name]
            elif tuple(values[position].shape) == _ABSENT:
                raise _missing(
                    self.inputs.path_of(name),
                    self.stage,
                    "pass it to step() on the rank of the first stage, where all inputs of the model go, or by "
                    "keyword on this one",
                )
        return tuple(values)


def _missing(path: str, stage: int, mend: str) -> PipelineUsageError:
    return PipelineUsageError(f"stage {stage} uses the model's input '{path}', which was not given: {mend}")


def _leaves(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, torch.Tensor) or value is None:
        return [(name, value)]
    try:
        found, _ = tree_flatten_with_path(value)
        return [(name + keystr(path), leaf) for path, leaf in found]
    except ValueError:  # a container whose parts have no names
        return [(f"{name}<{place}>", leaf) for place, leaf in enumerate(tree_flatten(value)[0])]


def _argument(path: str) -> str:
    """The argument that a path begins with."""
    return re.split(r"[\[.<]", path, maxsplit=1)[0]


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if isinstance(value, torch.Tensor) or isinstance(other, torch.Tensor) or type(value) is not type(other):
        return False
    return bool(value == other)


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
