"""Cut a batch into microbatches, and put the outputs of microbatches together again."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.running import (
    DEFAULT_CHUNK_DIM,
    TensorChunkSpec,
    Values,
    _CustomReducer,
    _LossReducer,
    _Replicate,
    check_rows,
    concatenate_dtensors,
    describe,
    is_block_mask,
    is_cuttable,
    is_dtensor,
    is_replicated,
    let_broadcast,
    split_block_mask,
    sum_reducer,
)
from pp_runtime.running import split_tensor as _split_tensor

__all__ = [
    "DEFAULT_CHUNK_DIM",
    "TensorChunkSpec",
    "_CustomReducer",
    "_LossReducer",
    "_Replicate",
    "_split_tensor",
    "merge_chunks",
    "split_args_kwargs_into_chunks",
    "sum_reducer",
]


def split_args_kwargs_into_chunks(
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
    chunks: int,
    args_chunk_spec: tuple[TensorChunkSpec, ...] | None = None,
    kwargs_chunk_spec: dict[str, TensorChunkSpec] | None = None,
) -> tuple[list[tuple], list[dict]]:
    """Cut positional and keyword arguments into at most ``chunks`` microbatches.

    Without a spec every tensor and ``BlockMask`` is cut along dimension 0 and everything else is replicated. So is a
    tensor or ``BlockMask`` whose batch dimension is 1 beside a larger batch, such as position ids: it broadcasts over
    any rows, so every microbatch gets the whole of it. The positional arguments say what the batch is; only where none
    of them is cut, the keyword arguments do. So a batch that is itself 1 is never taken for several microbatches.
    The number of microbatches is ``chunks``, or the smallest size along a cut dimension where that is less.
    Sizes that ``chunks`` does not divide give microbatches that differ by one row, as ``torch.tensor_split``.
    """
    kwargs = {} if kwargs is None else kwargs
    if args_chunk_spec is None and kwargs_chunk_spec is None and _all_plain((*args, *kwargs.values()), chunks):
        return _split_plain(args, kwargs, chunks)
    positional, keyword = Values("args", tuple(args), args_chunk_spec), Values("kwargs", kwargs, kwargs_chunk_spec)
    let_broadcast(positional, keyword, chunks)
    count = min([chunks, *positional.rows, *keyword.rows])
    return positional.cut(count), keyword.cut(count)


def split_batch(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chunks: int,
    args_chunk_spec: tuple[TensorChunkSpec, ...] | None,
    kwargs_chunk_spec: dict[str, TensorChunkSpec] | None,
    *,
    batch_is_elsewhere: bool,
) -> tuple[list[tuple], list[dict]]:
    """As :func:`split_args_kwargs_into_chunks`, into exactly ``chunks`` microbatches; an error names what is too small.

    With ``batch_is_elsewhere`` another rank has the positional arguments, and refuses a batch of 1; keyword arguments
    of batch 1 broadcast then.
    """
    arg_mbs, kwarg_mbs = split_args_kwargs_into_chunks(args, kwargs, chunks, args_chunk_spec, kwargs_chunk_spec)
    if len(arg_mbs) == chunks:
        return arg_mbs, kwarg_mbs
    positional, keyword = Values("args", args, args_chunk_spec), Values("kwargs", kwargs, kwargs_chunk_spec)
    let_broadcast(positional, keyword, chunks, batch_is_elsewhere=batch_is_elsewhere)
    check_rows("input", chunks, positional, keyword)
    return positional.cut(chunks), keyword.cut(chunks)


def split_target(target: Any, chunks: int, spec: Any) -> list[Any]:
    """A target of any structure as ``chunks`` targets. One spec is for every tensor in it; None cuts dimension 0."""
    if spec is None and _all_plain((target,), chunks):
        pieces = target.tensor_split(min(chunks, len(target))) if len(target) else ()
        if len(pieces) == chunks:
            return list(pieces)
    if isinstance(spec, TensorChunkSpec) or is_replicated(spec):
        spec = tree_map(lambda value: spec if is_cuttable(value) else _Replicate(), target, is_leaf=is_block_mask)
    values = Values("target", (target,), None if spec is None else (spec,))
    nothing = Values("kwargs", {}, None)
    let_broadcast(values, nothing, chunks)
    check_rows("target", chunks, values, nothing)
    return [piece for (piece,) in values.cut(chunks)]


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


def _all_plain(values: tuple[Any, ...], chunks: int) -> bool:
    """Whether these are tensors that are all cut, or all are not."""
    return all(
        type(value) is torch.Tensor
        and value.dim() > 0
        and not value.requires_grad
        and (chunks == 1 or value.size(DEFAULT_CHUNK_DIM) != 1)
        for value in values
    )


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
            raise PipelineTypeError(f"the merge spec says TensorChunkSpec({dim}) for {describe(value)}")
    if all(value.dim() == 0 for value in values):
        return torch.stack(values)
    if not any(is_dtensor(value) for value in values):
        return torch.cat(values, dim)

    return concatenate_dtensors(values, dim)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return value is other or (value.shape == other.shape and bool(torch.equal(value, other)))
    return bool(value == other)


# Names of torch's that programs import from here


def _split_block_mask(block_mask: Any, num_chunks: int) -> list[Any]:
    return split_block_mask(block_mask, num_chunks)


def _shard_dict_of_args(args_dict: dict, args_chunk_spec: dict, num_chunks: int) -> list[dict]:
    """Cut a dictionary of arguments by a dictionary of specs, into at most ``num_chunks``."""
    values = Values("args", args_dict, args_chunk_spec)
    return values.cut(min([num_chunks, *values.rows]))


def __getattr__(name: str) -> Any:
    if name == "BlockMask":  # its import takes a second
        from torch.nn.attention.flex_attention import BlockMask

        return BlockMask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
