"""Device memory that the processes of a host can map: which devices have it, and who made it known.

A channel between two ranks of one host whose devices have it needs no communicator: the sender copies into the
receiver's memory (csrc/transport/device_memory.h). CUDA's is built in; others are made known by
:func:`register_peer_memory`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pp_runtime import _C

MakesPeerMemory = Callable[[torch.device], "_C.PeerMemory"]
_makers: dict[str, MakesPeerMemory] = {}


def register_peer_memory(device_type: str, make: MakesPeerMemory) -> None:
    """Let channels between devices of this type, on one host, go through memory that both ranks map.

    ``make(device)`` returns what implements csrc/oversight/peer_memory.h for the device, or raises RuntimeError where
    it has none. Registering a type again replaces it.
    """
    _makers[device_type] = make


def peer_memory_of(device: torch.device) -> _C.PeerMemory | None:
    """The peer memory of a device; None where it has none."""
    make = _makers.get(device.type)
    if make is None:
        return None
    try:
        return make(device)
    except RuntimeError:
        return None


_cuda = getattr(_C, "CudaPeerMemory", None)  # of a CUDA build
if _cuda is not None:
    register_peer_memory("cuda", _cuda)
