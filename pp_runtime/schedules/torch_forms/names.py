"""Short names that programs take from torch.distributed.pipelining.schedules beside the schedules and passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.orders import ir

F = ir.FORWARD
B = ir.FULL_BACKWARD
I = ir.BACKWARD_INPUT  # noqa: E741 - torch's name
W = ir.BACKWARD_WEIGHT

_TARGET_CHUNK_SPEC = TensorChunkSpec(0)


def _check_torch_compile_compatibility(stages: Sequence[Any], schedule_name: str) -> None:
    """Compiled stages run under every schedule, so there is nothing to refuse."""


def _batch_p2p(p2p_ops: list[dist.P2POp], desc: str | None = None) -> list[dist.Work]:
    """Start sends and receives of a program's own: one by one if all go one way, else as a group."""
    if len({op.op for op in p2p_ops}) > 1:
        return dist.batch_isend_irecv(p2p_ops)
    peer = "group_dst" if p2p_ops and p2p_ops[0].op is dist.isend else "group_src"
    works = [op.op(op.tensor, group=op.group, tag=op.tag, **{peer: op.group_peer}) for op in p2p_ops]
    return [work for work in works if work is not None]


def _sorted_batch_p2p(p2p_ops: list[dist.P2POp], desc: str | None = None) -> dict[int, list[dist.Work]]:
    """Start sends and receives of a program's own, peer by peer; the works of each peer."""
    of_peer: dict[int, list[dist.P2POp]] = {}
    for op in sorted(p2p_ops, key=lambda op: op.peer):
        of_peer.setdefault(op.peer, []).append(op)
    return {peer: _batch_p2p(ops, desc) for peer, ops in of_peer.items()}


def _wait_batch_p2p(work: Iterable[Any]) -> None:
    """Wait for each of some works, as custom functions do with what they take from ``fwd_recv_ops``."""
    for each in work:
        each.wait()
