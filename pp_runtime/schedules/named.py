"""The schedules that have a name. Each is its order in the catalogue and the stages that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pp_runtime.errors import PipelineModeError
from pp_runtime.microbatch import TensorChunkSpec
from pp_runtime.schedules.runtime_schedule import _PipelineScheduleRuntime
from pp_runtime.schedules.single import PipelineScheduleSingle
from pp_runtime.stage import _PipelineStageBase


class _ScheduleForwardOnly(PipelineScheduleSingle):
    """All forwards, no backward and no loss."""

    _order_name = "ForwardOnly"
    _trains = False

    def _check_mode(self, target: Any, loss_kwargs: Any) -> None:
        if target is not None:
            raise PipelineModeError("a forward-only schedule computes no loss: call step without a target")

    def _check_loss_inputs(self, target_mbs: list | None, losses: list | None) -> None:
        if target_mbs is not None or losses is not None:
            raise PipelineModeError("a forward-only schedule computes no loss: call step without target and losses")


class ScheduleGPipe(PipelineScheduleSingle):
    """GPipe: all forwards, then all backwards. Huang et al., 2018, arXiv:1811.06965."""

    _order_name = "GPipe"


class Schedule1F1B(PipelineScheduleSingle):
    """1F1B: after a warm-up, one forward and one backward in turn. Narayanan et al., 2018, arXiv:1806.03377."""

    _order_name = "1F1B"


class ScheduleZB1P(PipelineScheduleSingle):
    """ZB-H1: 1F1B whose weight gradients fill the bubble, in the memory of 1F1B. Qi et al., 2023, arXiv:2401.10241."""

    _order_name = "ZB1P"


class ScheduleZB2P(PipelineScheduleSingle):
    """ZB-H2: almost no bubble, in about twice the memory of 1F1B. Qi et al., 2023, arXiv:2401.10241."""

    _order_name = "ZB2P"


class _NamedMultiSchedule(_PipelineScheduleRuntime):
    """The constructor that the named schedules with several stages a rank share."""

    def __init__(
        self,
        stages: list[_PipelineStageBase],
        n_microbatches: int,
        loss_fn: Callable | None = None,
        args_chunk_spec: tuple[TensorChunkSpec, ...] | None = None,
        kwargs_chunk_spec: dict[str, TensorChunkSpec] | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
        defer_pp_recv: bool = False,
        *,
        target_chunk_spec: Any = None,
    ) -> None:
        chunks = args_chunk_spec, kwargs_chunk_spec, output_merge_spec
        options = None, scale_grads, backward_requires_autograd
        specs = {"defer_pp_recv": defer_pp_recv, "target_chunk_spec": target_chunk_spec}
        super().__init__(stages, n_microbatches, loss_fn, *chunks, *options, **specs)


class ScheduleLoopedBFS(_NamedMultiSchedule):
    """Breadth-first: a rank runs all microbatches of its earlier stage first. Lamy-Poirier, 2022, arXiv:2211.05953."""

    _order_name = "LoopedBFS"

    def __init__(
        self,
        stages: list[_PipelineStageBase],
        n_microbatches: int,
        loss_fn: Callable | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
        defer_pp_recv: bool = False,
        *,
        target_chunk_spec: Any = None,
    ) -> None:
        chunks = None, None, output_merge_spec
        options = scale_grads, backward_requires_autograd, defer_pp_recv
        super().__init__(stages, n_microbatches, loss_fn, *chunks, *options, target_chunk_spec=target_chunk_spec)


class ScheduleInterleaved1F1B(_NamedMultiSchedule):
    """1F1B over several looped stages a rank, depth first. Narayanan et al., 2021, arXiv:2104.04473."""

    _order_name = "Interleaved1F1B"


class ScheduleInterleavedZeroBubble(_NamedMultiSchedule):
    """Interleaved 1F1B whose weight gradients fill the bubble. Qi et al., 2023, arXiv:2401.10241."""

    _order_name = "InterleavedZeroBubble"


class ScheduleZBVZeroBubble(_NamedMultiSchedule):
    """ZB-V: two stages a rank in a V, no bubble where F, I and W take as long. Qi et al., 2023, arXiv:2401.10241."""

    _order_name = "ZBVZeroBubble"


class ScheduleDualPipeV(_NamedMultiSchedule):
    """DualPipe folded into a V: forwards one way overlap backwards the other way. DeepSeek, arXiv:2412.19437."""

    _order_name = "DualPipeV"


class ScheduleVHalf(_NamedMultiSchedule):
    """Two stages a rank in a V, with about half the activations of 1F1B. Qi et al., 2024, arXiv:2405.15362."""

    _order_name = "VHalf"


class ScheduleVMin(_NamedMultiSchedule):
    """Two stages a rank in a V, with about a third of the activations of 1F1B. Qi et al., 2024, arXiv:2405.15362."""

    _order_name = "VMin"
