"""What the runtime asks of a stage that a rank holds; manual and traced stages are made on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pp_runtime import _C
from pp_runtime.planning import StageWiring
from pp_runtime.running.data_parallel import DataParallelAdapter
from pp_runtime.running.meter import Meter


class StepScale(Protocol):
    """What knows, during a step, which gradients are the step's."""

    def scale(self, parameters: list[torch.nn.Parameter], divisor: int) -> None: ...


class HeldStage:
    """A stage as the runtime, the gradients and the clipping see it."""

    submod: torch.nn.Module
    stage_index: int
    num_stages: int
    device: torch.device
    group: dist.ProcessGroup | None
    group_rank: int
    group_size: int
    stage_index_to_group_rank: Mapping[int, int]
    has_backward: bool
    chunks: int | None
    output_chunks: list[Any]
    dw_builder: Callable[[], Callable[..., None]] | None

    _core: _C.Stage
    _adapter: DataParallelAdapter | None
    _meter: Meter | None
    _gradients: StepScale | None
    # A loss function that is a module is the model's too; the schedule of the last stage says so.
    _loss_modules: tuple[torch.nn.Module, ...]
    _ties: dict[str, list[str]]
    _tie_owners: dict[str, int]
    # Whether a schedule runs a step with this stage now.
    _inside_step: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the model's first stage."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the model's last stage."""
        return self.stage_index == self.num_stages - 1

    @property
    def wiring(self) -> StageWiring | None:
        """Which outputs of which stages are this one's inputs; None for a chain, where all outputs go to the next."""
        return None

    def tied_parameters(self) -> tuple[tuple[tuple[int, str], ...], ...]:
        """The parameters that a trace found in several stages, each as (stage, name) pairs; none of a manual stage."""
        return ()

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The modules whose parameters this stage trains: its part of the model, and a loss function that is one."""
        return (self.submod, *self._loss_modules)

    def adapter(self) -> DataParallelAdapter | None:
        """How this stage's gradients are reduced, where its module was wrapped for data parallelism when last seen."""
        return self._adapter

    def refresh(self) -> None:
        """See what a program did to this stage since the last step."""
        raise NotImplementedError

    def replaced(self, *, in_step: bool = True) -> frozenset[str]:
        """Which of its methods a program replaced."""
        raise NotImplementedError
