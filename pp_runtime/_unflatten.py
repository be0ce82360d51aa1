"""The names of ``torch.distributed.pipelining._unflatten``, which are torch's own."""

from __future__ import annotations

from typing import Any

from pp_runtime.splitting import torch_pipelining


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch_pipelining("_unflatten"), name)
