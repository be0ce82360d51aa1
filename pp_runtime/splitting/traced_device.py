"""The device of a traced graph, which the tracer writes into every call that makes or moves a tensor."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import fx


def set_device(module: fx.GraphModule, device: torch.device) -> None:
    """Let a graph compute on a device, wherever it was traced: in ``torch.zeros(..., device=...)``, ``x.to(...)``."""
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    values = [node.meta.get("val") for part in parts for node in part.graph.nodes]
    traced_on = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    for part in parts:
        _set(part, device, traced_on - {device.type})


def _set(module: fx.GraphModule, device: torch.device, others: Set[str]) -> None:
    def moved(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    changed = False
    for node in module.graph.nodes:
        args, kwargs = fx.node.map_aggregate(node.args, moved), fx.node.map_aggregate(node.kwargs, moved)
        if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[0] in others:
            args = (device.type, *node.args[1:])  # the type in torch.autocast(x.device.type)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs, changed = args, kwargs, True
    if changed:
        module.recompile()
