"""Splitting and joining what ``torch.tensor_split`` and ``torch.cat`` cannot: DTensors and BlockMasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch

from pp_runtime.errors import PipelineUsageError


def is_dtensor(value: Any) -> TypeGuard[Any]:
    """Whether this is a DTensor."""
    # Importing torch.distributed.tensor costs half a second; where nobody has, there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: Any) -> torch.Tensor:
    """This rank's part of a DTensor, without a graph; what is still on its way is waited for."""
    return waited_for(tensor._local_tensor)


def waited_for(value: Any) -> Any:
    """The tensor that a collective will have made, once it has; anything else as it is."""
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is not None and isinstance(value, module.AsyncCollectiveTensor):
        return value.trigger_wait()
    return value


def is_block_mask(value: Any) -> bool:
    """Whether this is a BlockMask of flex attention."""
    module = sys.modules.get("torch.nn.attention.flex_attention")
    return module is not None and isinstance(value, module.BlockMask)


def split_dtensor(tensor: Any, dim: int, num_chunks: int) -> Sequence[torch.Tensor]:
    """Cut each rank's own part, so that nothing is gathered; the global size of a piece is as tensor_split gives it."""
    quotient, remainder = divmod(tensor.shape[dim], num_chunks)
    pieces = []
    for index, local in enumerate(torch.tensor_split(tensor.to_local(), num_chunks, dim)):
        shape = list(tensor.shape)
        shape[dim] = quotient + (index < remainder)
        pieces.append(dtensor_like(local, tensor, shape))
    return pieces


def dtensor_like(local: torch.Tensor, like: Any, shape: Sequence[int] | None = None) -> torch.Tensor:
    """The DTensor that has this local part, where ``like`` has its own; of ``like``'s global shape unless given one."""
    from torch.distributed.tensor import DTensor

    whole = like.shape if shape is None else torch.Size(shape)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=whole, stride=like.stride(), run_check=False
    )


def concatenate_dtensors(values: Sequence[Any], dim: int) -> torch.Tensor:
    """Join each rank's own parts; the global size is the sum of the pieces'."""
    from torch.distributed.tensor import DTensor

    if not all(isinstance(value, DTensor) and value.placements == values[0].placements for value in values):
        raise PipelineUsageError(
            "the microbatches of one output must all be DTensors with the same placements, or all plain tensors"
        )
    shape = list(values[0].shape)
    shape[dim] = sum(value.shape[dim] for value in values)
    return dtensor_like(torch.cat([value.to_local() for value in values], dim), values[0], shape)


def split_block_mask(block_mask: Any, num_chunks: int) -> list[Any]:
    """Cut along the batch; a mask of batch 1 broadcasts, and goes whole to every microbatch."""
    if block_mask.kv_num_blocks.size(0) == 1:
        return [block_mask] * num_chunks
    if block_mask.kv_num_blocks.size(0) < num_chunks:
        raise PipelineUsageError(
            f"a BlockMask of batch {block_mask.kv_num_blocks.size(0)} cannot be cut into {num_chunks} microbatches: "
            "use a larger batch or fewer microbatches"
        )

    def cut(blocks: torch.Tensor | None) -> Sequence[Any]:
        return [None] * num_chunks if blocks is None else torch.tensor_split(blocks, num_chunks, 0)

    masks: list[Any] = []
    first_row = 0
    for counts, indices, full_counts, full_indices in zip(
        cut(block_mask.kv_num_blocks),
        cut(block_mask.kv_indices),
        cut(block_mask.full_kv_num_blocks),
        cut(block_mask.full_kv_indices),
        strict=True,
    ):
        masks.append(
            type(block_mask).from_kv_blocks(
                kv_num_blocks=counts,
                kv_indices=indices,
                full_kv_num_blocks=full_counts,
                full_kv_indices=full_indices,
                BLOCK_SIZE=block_mask.BLOCK_SIZE,
                mask_mod=_shifted(block_mask, first_row),
                seq_lengths=block_mask.seq_lengths,
            )
        )
        first_row += len(counts)
    return masks


def _shifted(block_mask: Any, idx: int) -> Callable[..., Any]:
    """The mask function of a microbatch, whose row 0 is the batch's row ``idx``.

    The names are those that torch's closure has: torchtitan's GraphPP finds the row by them, to trace it as a tensor
    and not as a number, which a graph traced with one microbatch would give to all.
    """

    def shifted_mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return block_mask.mask_mod(b + torch.full_like(b, idx), h, q_idx, kv_idx)

    return shifted_mask_mod
