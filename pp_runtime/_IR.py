"""The names of ``torch.distributed.pipelining._IR``: ours where this package has them, torch's own elsewhere."""

from __future__ import annotations

from typing import Any

from pp_runtime.splitting import torch_pipelining

_OURS = ("Pipe", "SplitPoint", "annotate_split_points", "pipe_split", "pipeline")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _OURS:
        from pp_runtime import splitting

        return getattr(splitting, name)
    return getattr(torch_pipelining("_IR"), name)
