"""The arguments of a step, flattened: what each can be cut into, and the pieces."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.running.values.chunk_specs import DEFAULT_CHUNK_DIM, TensorChunkSpec, _Replicate
from pp_runtime.running.values.special_tensors import is_block_mask, is_dtensor, split_block_mask, split_dtensor

_BY_DEFAULT = TensorChunkSpec(DEFAULT_CHUNK_DIM)  # known by its identity: nobody asked for this cut
_ANY_NUMBER = sys.maxsize  # of microbatches


class Values:
    """Arguments of one sort, flattened, each with its spec and with how many microbatches it can be cut into."""

    def __init__(self, sort: str, given: Any, specs: Any) -> None:
        self.sort = sort
        self._given = given
        self.values, self.specs, self._tree = _flatten_with_specs(given, specs, sort)
        self.rows = [_ANY_NUMBER if is_replicated(spec) else self._rows(place) for place, spec in enumerate(self.specs)]

    @property
    def batch(self) -> int:
        """The most rows of a value that is cut; 0 if none is."""
        return max((rows for rows in self.rows if rows != _ANY_NUMBER), default=0)

    def broadcast(self) -> None:
        """Give whole what has one row, unless its spec was given."""
        for place, rows in enumerate(self.rows):
            if rows == 1 and self.specs[place] is _BY_DEFAULT:
                self.specs[place], self.rows[place] = _Replicate(), _ANY_NUMBER

    def cut(self, count: int) -> list[Any]:
        """The same structure once for each of ``count`` microbatches."""
        pieces = [_split(value, spec, count) for value, spec in zip(self.values, self.specs, strict=True)]
        return [tree_unflatten([piece[i] for piece in pieces], self._tree) for i in range(count)]

    def describe(self, place: int) -> str:
        """The name of a value, and what it is."""
        path = tree_flatten_with_path(self._given, is_leaf=is_block_mask)[0][place][0]
        where = keystr(path[1:] if self.sort == "target" else path)
        return f"{self.sort}{where}, {describe(self.values[place])},"

    def _rows(self, place: int) -> int:
        value, spec = self.values[place], self.specs[place]
        if not isinstance(spec, TensorChunkSpec):
            raise PipelineTypeError(
                f"a chunk spec is TensorChunkSpec or _Replicate, got {spec!r} for {self.describe(place)} in "
                f"{self.sort}_chunk_spec"
            )
        if isinstance(value, torch.Tensor):
            if not -value.dim() <= spec.split_dim < value.dim():
                raise PipelineUsageError(
                    f"{self.describe(place)} has no dimension {spec.split_dim} to cut: change its TensorChunkSpec in "
                    f"{self.sort}_chunk_spec, or use _Replicate() there to give it whole to every microbatch"
                )
            return value.size(spec.split_dim)
        if is_block_mask(value):
            if spec.split_dim != 0:
                raise PipelineUsageError(
                    f"a BlockMask is cut along dimension 0 only, got TensorChunkSpec({spec.split_dim}) in "
                    f"{self.sort}_chunk_spec"
                )
            size = value.kv_num_blocks.size(0)
            return _ANY_NUMBER if size == 1 else size  # a mask of batch 1 broadcasts to any number of microbatches
        raise PipelineTypeError(
            f"{self.describe(place)} cannot be cut into microbatches: give it _Replicate() in {self.sort}_chunk_spec"
        )


def let_broadcast(positional: Values, keyword: Values, chunks: int, *, batch_is_elsewhere: bool = False) -> None:
    """Give whole what has one row beside a larger batch, which is that of the positional values where they have one."""
    if chunks > 1 and (batch_is_elsewhere or (positional.batch or keyword.batch) > 1):
        positional.broadcast()
        keyword.broadcast()


def check_rows(name: str, chunks: int, *sorts: Values) -> None:
    """An error if something cannot be cut into this many microbatches; names it where other values could be."""
    batch = max(values.batch for values in sorts)
    fewest, values = min(((min(values.rows), values) for values in sorts if values.rows), key=lambda pair: pair[0])
    if fewest >= chunks:
        return
    if fewest < batch or values.sort == "kwargs":
        beside = f"where other values have a batch of {batch}" if fewest < batch else f"with a batch of {fewest}"
        raise PipelineUsageError(
            f"{values.describe(values.rows.index(fewest))} cannot be cut into {chunks} microbatches {beside}: use a "
            f"larger batch or fewer microbatches, or, at its place in {values.sort}_chunk_spec, _Replicate() to give "
            "it whole to every microbatch or TensorChunkSpec(dimension) to cut it along another dimension"
        )
    raise PipelineUsageError(
        f"the {name} has a batch of {fewest}, which cannot be cut into {chunks} microbatches: "
        f"use a batch of at least {chunks}, or a schedule with n_microbatches={max(fewest, 1)}"
    )


def _flatten_with_specs(values: Any, specs: Any, name: str) -> tuple[list[Any], list[Any], TreeSpec]:
    if not values:
        return [], [], tree_flatten(values)[1]  # a rank without these arguments needs no specs for them
    if specs is None:
        specs = tree_map(_default_spec, values, is_leaf=is_block_mask)
    elif isinstance(values, tuple):
        specs = tuple(specs)
    elif values.keys() != specs.keys():
        raise PipelineUsageError(
            f"kwargs_chunk_spec has the names {sorted(specs)} but the keyword arguments are {sorted(values)}: "
            "give every keyword argument one spec"
        )
    else:
        # Leaves are matched by position, so both dictionaries must list their names in the same order.
        specs = {key: specs[key] for key in values}
    flat_values, tree = tree_flatten(values, is_leaf=is_block_mask)
    flat_specs, _ = tree_flatten(specs)
    if len(flat_values) != len(flat_specs):
        raise PipelineUsageError(
            f"{name}_chunk_spec describes {len(flat_specs)} values but {name} hold {len(flat_values)}: "
            f"give it the structure of {name}, with TensorChunkSpec or _Replicate at each value"
        )
    return flat_values, flat_specs, tree


def _default_spec(value: Any) -> TensorChunkSpec | _Replicate:
    return _BY_DEFAULT if is_cuttable(value) else _Replicate()


def is_cuttable(value: Any) -> bool:
    """Whether this has a dimension to cut."""
    return is_block_mask(value) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def is_replicated(spec: Any) -> bool:
    """Whether this is ``_Replicate``: the class itself is accepted beside its instances, as in torch."""
    return spec is _Replicate or isinstance(spec, _Replicate)


def _split(value: Any, spec: Any, count: int) -> Sequence[Any]:
    if is_replicated(spec):
        return [value] * count
    if count == 0:
        return []
    if is_block_mask(value):
        return split_block_mask(value, count)
    return split_tensor(value, spec, count)


def split_tensor(tensor: torch.Tensor, spec: TensorChunkSpec, num_chunks: int) -> Sequence[torch.Tensor]:
    """The pieces of a tensor, of a DTensor without moving anything between ranks."""
    if tensor.size(spec.split_dim) < num_chunks:
        raise PipelineUsageError(
            f"{describe(tensor)} has {tensor.size(spec.split_dim)} rows in dimension {spec.split_dim}, which is fewer "
            f"than {num_chunks} microbatches: use a larger batch or fewer microbatches"
        )
    if is_dtensor(tensor):
        pieces = split_dtensor(tensor, spec.split_dim, num_chunks)
    else:
        pieces = torch.tensor_split(tensor, num_chunks, spec.split_dim)
    if tensor.requires_grad and tensor.is_leaf:
        # A piece of a leaf is a view, whose .grad autograd would not keep.
        for piece in pieces:
            piece.retain_grad()
    return pieces


def describe(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a value of type {type(value).__name__}"
