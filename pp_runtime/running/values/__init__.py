"""What goes into a stage and from stage to stage: batches cut and merged, payloads, DTensors, block masks."""

from __future__ import annotations

from pp_runtime.running.values.batch_values import (
    Values,
    check_rows,
    describe,
    is_cuttable,
    is_replicated,
    let_broadcast,
    split_tensor,
)
from pp_runtime.running.values.chunk_specs import (
    DEFAULT_CHUNK_DIM,
    TensorChunkSpec,
    _CustomReducer,
    _LossReducer,
    _Replicate,
    sum_reducer,
)
from pp_runtime.running.values.dtensors import DTensorExchange
from pp_runtime.running.values.payload import (
    _normalize_model_output_as_tuple,
    flatten_output,
    rebuild_args,
    tensors_and_structure,
)
from pp_runtime.running.values.special_tensors import (
    concatenate_dtensors,
    dtensor_like,
    is_block_mask,
    is_dtensor,
    local_part,
    split_block_mask,
)

__all__ = [
    "DEFAULT_CHUNK_DIM",
    "DTensorExchange",
    "TensorChunkSpec",
    "Values",
    "_CustomReducer",
    "_LossReducer",
    "_Replicate",
    "_normalize_model_output_as_tuple",
    "check_rows",
    "concatenate_dtensors",
    "describe",
    "dtensor_like",
    "flatten_output",
    "is_block_mask",
    "is_cuttable",
    "is_dtensor",
    "is_replicated",
    "let_broadcast",
    "local_part",
    "rebuild_args",
    "split_block_mask",
    "split_tensor",
    "sum_reducer",
    "tensors_and_structure",
]
