"""What a program says about cutting and joining its values: along which dimension, not at all, or by a function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import map_aggregate

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
