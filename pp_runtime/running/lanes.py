"""Lanes: the streams of an accelerator that receives, compute and sends are queued on; a CPU has none.

For tests lanes can be recorded: everything that the runtime asks of its device is written down, by the same code that
drives a real one, while the tensors stay on the CPU. :mod:`pp_runtime.planning.lane_order` proves the recording right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pp_runtime import _C
from pp_runtime.planning import LaneEntry

_log: _C.LaneLog | None = None


class LaneRecording:
    """What the steps of a runtime asked of their lanes, in the order in which the host asked."""

    def __init__(self, log: _C.LaneLog) -> None:
        self._log = log

    def entries(self) -> list[LaneEntry]:
        """Everything so far."""
        names = dict(self._log.names())
        return [
            LaneEntry(kind, names.get(lane, f"stream {lane}"), event, text, tuple(reads), tuple(writes), time)
            for kind, lane, event, text, reads, writes, time in self._log.records()
        ]


@contextmanager
def recorded_lanes(omitted_wait: int = -1) -> Iterator[LaneRecording]:
    """Runtimes of CPU stages that open their channels in this context have lanes, and these are recorded.

    They send through the process group, as an accelerator's do; with PP_RUNTIME_TRANSPORT=device into each other's
    memory. ``omitted_wait`` leaves the wait of that number out of the recording, as if the runtime had forgotten it.
    """
    global _log
    _log = _C.LaneLog(omitted_wait)
    try:
        yield LaneRecording(_log)
    finally:
        _log = None


def lanes_for(device: torch.device) -> _C.Lanes | None:
    """The lanes of a runtime whose tensors are on the device."""
    if device.type != "cpu":
        return _C.Lanes(device)
    return None if _log is None else _C.Lanes(_log)
