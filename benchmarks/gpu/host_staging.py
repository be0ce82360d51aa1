"""Lets torch's pipelines send a device's tensors over gloo: through host memory, for ranks that NCCL cannot connect.

torch.distributed.pipelining sends with the functions of torch.distributed, which hand gloo the address of a tensor
wherever it lies. Here these functions copy a device's tensor to the host (pinned, where the device can) and send that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_NAMES = ("isend", "irecv", "send", "recv", "batch_isend_irecv")


class _Arrival:
    """A receive into host memory; who waits for it has the tensor on the device."""

    def __init__(self, work: Any, host: torch.Tensor, tensor: torch.Tensor) -> None:
        self._work, self._host, self._tensor = work, host, tensor

    def wait(self, *timeout: Any) -> bool:
        self._work.wait(*timeout)
        self._tensor.detach().copy_(self._host, non_blocking=self._tensor.is_cuda)  # pinned memory outlives its tensor
        return True


class _Departure:
    """A send, which keeps what it sends."""

    def __init__(self, work: Any, host: torch.Tensor) -> None:
        self._work, self._host = work, host

    def wait(self, *timeout: Any) -> bool:
        self._work.wait(*timeout)
        return True


def stage_through_the_host() -> None:
    """From now on, in this process."""
    isend, irecv = dist.isend, dist.irecv
    if hasattr(isend, "through_the_host"):
        return

    def staged_isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.device.type == "cpu":
            return isend(tensor, *args, **kwargs)
        host = _host_like(tensor)
        host.copy_(tensor.detach())  # waits for the device
        return _Departure(isend(host, *args, **kwargs), host)

    def staged_irecv(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.device.type == "cpu":
            return irecv(tensor, *args, **kwargs)
        host = _host_like(tensor)
        return _Arrival(irecv(host, *args, **kwargs), host, tensor)

    def staged_batch(ops: list[Any]) -> list[Any]:
        # NCCL sends to its own rank, as torch 2.11 asks for before the first step; gloo does not.
        to_itself = [op for op in ops if op.group_peer == dist.get_rank(op.group)]
        sent = [op.tensor for op in to_itself if op.op is staged_isend]
        for op in to_itself:
            if op.op is staged_irecv:
                op.tensor.detach().copy_(sent.pop(0))
        peers = {staged_isend: "group_dst", staged_irecv: "group_src"}
        others = (op for op in ops if op not in to_itself)
        return [op.op(op.tensor, group=op.group, tag=op.tag, **{peers[op.op]: op.group_peer}) for op in others]

    staged_isend.through_the_host = True  # type: ignore[attr-defined]
    staged: dict[str, Callable[..., Any]] = {
        "isend": staged_isend,
        "irecv": staged_irecv,
        "send": lambda *args, **kwargs: staged_isend(*args, **kwargs).wait(),
        "recv": lambda *args, **kwargs: staged_irecv(*args, **kwargs).wait(),
        "batch_isend_irecv": staged_batch,
    }
    for name in _NAMES:
        setattr(dist, name, staged[name])
        setattr(dist.distributed_c10d, name, staged[name])


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
