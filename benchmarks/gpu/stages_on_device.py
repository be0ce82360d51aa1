"""What a rank's stages take by themselves on its device: what a step's time is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.stages_alone import StagesAlone
from pp_runtime.orders.ir import Action
from tests.helpers import device_cases


class StagesOnDevice(StagesAlone):
    """Times actions as the device's clock has them, by events around each. A sample waits for the device once."""

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        last: int,
        microbatch: tuple[int, ...],
        actions: Iterable[Action],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                super().__init__(modules, last, microbatch, actions)
        finally:
            torch.set_default_dtype(before)
        self._device = device
        self._pending: list[tuple[int, str, torch.Event, torch.Event]] = []

    def sample(self) -> None:
        """Time every action of a step."""
        super().sample()
        device_cases.synchronize(self._device)
        for stage, kind, begin, end in self._pending:
            self._samples[stage, kind].append(begin.elapsed_time(end) / 1e3)
        self._pending.clear()

    def forget(self) -> None:
        """Drop the samples so far, which had kernels to load."""
        self._samples.clear()

    def work(self) -> float:
        """Seconds that all actions of a step take one after the other."""
        times = self.times()
        return sum(times[stage][kind.value] for kind, stage, _ in self._actions if kind.value in "FIWB")

    def _timed(self, i: int, kind: str, work: Callable[..., Any], *args: Any) -> Any:
        begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
        begin.record()
        result = work(*args)
        end.record()
        self._pending.append((i, kind, begin, end))
        return result
