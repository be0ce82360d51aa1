"""Cut a batch into microbatches, and put the outputs of microbatches together again."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.node import map_aggregate
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.special_tensors import (
    concatenate_dtensors,
    is_block_mask,
    is_dtensor,
    split_block_mask,
    split_dtensor,
)

__all__ = ["TensorChunkSpec", "split_args_kwargs_into_chunks", "merge_chunks"]

DEFAULT_CHUNK_DIM = 0


class TensorChunkSpec:
    """Says along which dimension a tensor is cut into microbatches, or put together from them."""

    split_dim: int

    def __init__(self, split_dim: int) -> None:
        self.split_dim = split_dim

    def __repr__(self) -> str:
        return f"{type(self).__module__}.{type(self).__name__}({self.split_dim})"

    def __str__(self) -> str:
        return f"TensorChunkSpec({self.split_dim})"

    @staticmethod
    def from_tuple(chunk_dims: tuple[int, ...]) -> Any:
        """One spec for each positional argument: ``from_tuple((0, 0, 1))``; nested tuples give nested specs."""
        return map_aggregate(chunk_dims, TensorChunkSpec)  # type: ignore[arg-type]

    @staticmethod
    def from_dict(chunk_dims: dict[str, int]) -> Any:
        """One spec for each keyword argument: ``from_dict({"tokens": 0, "mask": 1})``."""
        return map_aggregate(chunk_dims, TensorChunkSpec)  # type: ignore[arg-type]


class _Replicate:
    """Says that every microbatch gets the whole value."""


class _CustomReducer:
    """A merge spec that folds the microbatches' values with ``reduce_fn``, from ``init_value`` on."""

    def __init__(self, init_value: Any, reduce_fn: Callable[[Any, Any], Any]) -> None:
        self.init_value = init_value
        self.reduce_fn = reduce_fn


class _LossReducer(_CustomReducer):
    """A reducer of losses."""


sum_reducer = _LossReducer(torch.tensor(0.0), operator.add)


def split_args_kwargs_into_chunks(
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    chunks: int,
    args_chunk_spec: tuple[TensorChunkSpec, ...] | None = None,
    kwargs_chunk_spec: dict[str, TensorChunkSpec] | None = None,
) -> tuple[list[tuple], list[dict]]:
    """Cut positional and keyword arguments into at most ``chunks`` microbatches.

    Without a spec every tensor and ``BlockMask`` is cut along dimension 0 and everything else is replicated.
    The number of microbatches is ``chunks``, or the smallest size along a cut dimension where that is less.
    Sizes that ``chunks`` does not divide give microbatches that differ by one row, as ``torch.tensor_split``.
    """
    kwargs = {} if kwargs is None else kwargs
    if args_chunk_spec is None and kwargs_chunk_spec is None and _all_plain_tensors((*args, *kwargs.values())):
        return _split_plain(args, kwargs, chunks)
    arg_values, arg_specs, arg_tree = _flatten_with_specs(tuple(args), args_chunk_spec, "args")
    kwarg_values, kwarg_specs, kwarg_tree = _flatten_with_specs(kwargs, kwargs_chunk_spec, "kwargs")

    values, specs = arg_values + kwarg_values, arg_specs + kwarg_specs
    count = min(
        [chunks, *(_rows(value, spec) for value, spec in zip(values, specs, strict=True) if not _is_replicated(spec))]
    )
    pieces = [_split(value, spec, count) for value, spec in zip(values, specs, strict=True)]

    cut = len(arg_values)
    return (
        [tree_unflatten([piece[i] for piece in pieces[:cut]], arg_tree) for i in range(count)],
        [tree_unflatten([piece[i] for piece in pieces[cut:]], kwarg_tree) for i in range(count)],
    )


def merge_chunks(chunks: list[Any], chunk_spec: Any) -> Any:
    """Put the values of all microbatches together: the inverse of the split.

    ``chunk_spec`` has the structure of one microbatch's value. A ``TensorChunkSpec`` concatenates (scalars are
    stacked), a reducer folds, anything else demands that all microbatches agree and gives that value.
    Without a spec every tensor is concatenated along dimension 0.
    """
    if not chunks:
        raise PipelineUsageError("merge_chunks needs at least one microbatch, got an empty list")
    flat_chunks = [tree_flatten(chunk)[0] for chunk in chunks]
    if chunk_spec is None:
        tree = tree_flatten(chunks[0])[1]
        specs: list[Any] = [
            TensorChunkSpec(DEFAULT_CHUNK_DIM) if isinstance(value, torch.Tensor) else None for value in flat_chunks[0]
        ]
    else:
        specs, tree = tree_flatten(chunk_spec)
    for index, flat_chunk in enumerate(flat_chunks):
        if len(flat_chunk) != len(specs):
            raise PipelineUsageError(
                f"microbatch {index} has {len(flat_chunk)} values but the merge spec {chunk_spec} describes "
                f"{len(specs)}: give output_merge_spec the structure of one microbatch's output"
            )
    return tree_unflatten([_merge(spec, [flat[i] for flat in flat_chunks]) for i, spec in enumerate(specs)], tree)


def _all_plain_tensors(values: tuple[Any, ...]) -> bool:
    return all(type(value) is torch.Tensor and value.dim() > 0 and not value.requires_grad for value in values)


def _split_plain(args: tuple[Any, ...], kwargs: dict[str, Any], chunks: int) -> tuple[list[tuple], list[dict]]:
    """What most steps are given: no containers, no specs. The general way would cost more than an action."""
    count = min([chunks, *(value.size(DEFAULT_CHUNK_DIM) for value in (*args, *kwargs.values()))])
    if count == 0:
        return [], []
    arg_pieces = [value.tensor_split(count) for value in args]
    kwarg_pieces = [value.tensor_split(count) for value in kwargs.values()]
    return (
        list(zip(*arg_pieces, strict=True)) if args else [() for _ in range(count)],
        [dict(zip(kwargs, pieces, strict=True)) for pieces in zip(*kwarg_pieces, strict=True)]
        if kwargs
        else [{} for _ in range(count)],
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
    cuttable = is_block_mask(value) or (isinstance(value, torch.Tensor) and value.dim() > 0)
    return TensorChunkSpec(DEFAULT_CHUNK_DIM) if cuttable else _Replicate()


def _is_replicated(spec: Any) -> bool:
    # The class itself is accepted beside its instances, as in torch.
    return spec is _Replicate or isinstance(spec, _Replicate)


def _rows(value: Any, spec: Any) -> int:
    """How many microbatches this value can be cut into."""
    if not isinstance(spec, TensorChunkSpec):
        raise PipelineTypeError(f"a chunk spec is TensorChunkSpec or _Replicate, got {spec!r} for {_describe(value)}")
    if isinstance(value, torch.Tensor):
        if not -value.dim() <= spec.split_dim < value.dim():
            raise PipelineUsageError(
                f"{_describe(value)} has no dimension {spec.split_dim} to cut: change its TensorChunkSpec, "
                "or use _Replicate to give it whole to every microbatch"
            )
        return value.size(spec.split_dim)
    if is_block_mask(value):
        if spec.split_dim != 0:
            raise PipelineUsageError(
                f"a BlockMask is cut along dimension 0 only, got TensorChunkSpec({spec.split_dim})"
            )
        size = value.kv_num_blocks.size(0)
        return sys.maxsize if size == 1 else size  # a mask of batch 1 broadcasts to any number of microbatches
    raise PipelineTypeError(
        f"{_describe(value)} cannot be cut into microbatches: give it _Replicate() in the chunk spec"
    )


def _split(value: Any, spec: Any, count: int) -> Sequence[Any]:
    if _is_replicated(spec):
        return [value] * count
    if count == 0:
        return []
    if is_block_mask(value):
        return split_block_mask(value, count)
    return _split_tensor(value, spec, count)


def _split_tensor(tensor: torch.Tensor, spec: TensorChunkSpec, num_chunks: int) -> Sequence[torch.Tensor]:
    if tensor.size(spec.split_dim) < num_chunks:
        raise PipelineUsageError(
            f"{_describe(tensor)} has {tensor.size(spec.split_dim)} rows in dimension {spec.split_dim}, which is fewer "
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


def _merge(spec: Any, values: list[Any]) -> Any:
    if isinstance(spec, TensorChunkSpec):
        return _concatenate(values, spec.split_dim)
    if isinstance(spec, _CustomReducer):
        result = spec.init_value
        for value in values:
            result = spec.reduce_fn(result, value)
        return result
    for index, value in enumerate(values):
        if not _equal(value, values[0]):
            raise PipelineUsageError(
                f"microbatch {index} returned {value!r} where microbatch 0 returned {values[0]!r}: values that are not "
                "cut must be the same in every microbatch, or give them a reducer in output_merge_spec"
            )
    return values[0]


def _concatenate(values: list[Any], dim: int) -> torch.Tensor:
    for value in values:
        if not isinstance(value, torch.Tensor):
            raise PipelineTypeError(f"the merge spec says TensorChunkSpec({dim}) for {_describe(value)}")
    if all(value.dim() == 0 for value in values):
        return torch.stack(values)
    if not any(is_dtensor(value) for value in values):
        return torch.cat(values, dim)

    return concatenate_dtensors(values, dim)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return value is other or (value.shape == other.shape and bool(torch.equal(value, other)))
    return bool(value == other)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a value of type {type(value).__name__}"
