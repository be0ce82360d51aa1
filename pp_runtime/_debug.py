"""Values as short text, for messages and logs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import map_aggregate


def friendly_debug_info(v: object) -> str:
    """A tensor as its shape, gradient flag and dtype; anything else as its text."""
    if isinstance(v, torch.Tensor):
        return f"Tensor({v.shape}, grad={v.requires_grad}, dtype={v.dtype})"
    return str(v)


def map_debug_info(a: Any) -> Any:
    """The same nest of lists, tuples and dicts, with :func:`friendly_debug_info` of every item."""
    return map_aggregate(a, friendly_debug_info)
