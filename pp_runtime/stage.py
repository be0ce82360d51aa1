"""Stages: the pieces of the model that a rank holds, as torch.distributed.pipelining names and shapes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from pp_runtime import _C
from pp_runtime.errors import PipelineModeError, PipelineTypeError, PipelineUsageError
from pp_runtime.planning import StageWiring, stage_wiring
from pp_runtime.running import (
    ChunkMethods,
    CopiedStage,
    DataParallelAdapter,
    DTensorExchange,
    TellsRefusals,
    TorchStageNames,
    Wrapped,
    _normalize_model_output_as_tuple,
    base_of_stages,
    compile_module,
    find_parameter,
    flatten_output,
    rebuild_args,
    remember_group,
    scale_gradients,
)

__all__ = ["PipelineStage", "_normalize_model_output_as_tuple", "build_stage"]


@base_of_stages
class _PipelineStageBase(ChunkMethods, TorchStageNames, CopiedStage, TellsRefusals):
    """What manual and traced stages have in common.

    Attributes that programs read: ``submod`` (may be replaced between steps), ``stage_index``, ``num_stages``,
    ``is_first``, ``is_last``, ``device``, ``group``, ``group_rank``, ``group_size``, ``has_backward``.
    """

    def __init__(
        self,
        submodule: torch.nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        dw_builder: Callable[[], Callable[..., None]] | None = None,
        get_mesh: Callable[..., Any] | None = None,
    ) -> None:
        _check_arguments(submodule, stage_index, num_stages, dw_builder)
        self.submod = submodule
        self.stage_index = stage_index
        self.num_stages = num_stages
        self.device = torch.device(device)
        self.group = group
        self.dw_builder = dw_builder
        self.group_rank = dist.get_rank(group)
        self.group_size = dist.get_world_size(group)
        if self.group_rank < 0:
            raise PipelineUsageError(
                f"this rank ({dist.get_rank()}) is not in the process group of stage {stage_index}: "
                "make the stage only on the group's ranks"
            )
        if self.group_size > num_stages:
            raise PipelineModeError(
                f"Pipeline group size {self.group_size} cannot be larger than number of stages {num_stages}: "
                "split the model into at least one stage a rank"
            )
        remember_group(group)
        self.has_backward = False
        self.output_chunks = []
        self.chunks = None
        self.log_prefix = f"[Stage {stage_index}]"
        self.stage_index_to_group_rank = {stage: stage % self.group_size for stage in range(num_stages)}
        self._ties = {}
        self._get_mesh = get_mesh
        self._make_core()

    def _make_core(self) -> None:
        self._tie_owners = {}
        self._loss_modules = ()
        self._wrapped = Wrapped()
        self._adapter = None
        self._meter = None
        self._gradients = None
        self._exchange = DTensorExchange(self.stage_index, self._get_mesh)
        self._core = _C.Stage(self.stage_index, self.is_first, self.is_last, self._callbacks())
        self._make_caches()

    def compile(self, **options: Any) -> None:
        """Compile this stage's module in place with the ``pp_runtime`` backend, so that split schedules gain by it.

        ``options`` are those of ``torch.compile`` (``mode``, ``dynamic``, ``fullgraph``, ``options`` with the backend's
        ``compiler`` in it). Compiling block by block, ``block.compile(backend="pp_runtime")``, takes less time to
        compile and works as well. Call it before the first step, and before the module is wrapped in
        ``DistributedDataParallel``, or after: what is compiled is the module inside.
        """
        module = self.submod
        compile_module(module.module if isinstance(module, DistributedDataParallel) else module, **options)

    # What the runtime uses

    def tie(self, parameter: str, label: str) -> None:
        """Declare a parameter of this stage to be the same as those that other stages tie by the same label.

        Each stage keeps its copy, and every step adds up the gradients of all of them, so that copies that begin equal
        stay equal. ``parameter`` is a name of ``submod.named_parameters()``. Every stage that shares the parameter ties
        it before the first step; there the ranks compare shapes and values, and raise PipelineUsageError where they
        differ. A parameter that two stages of one rank share as one object needs no tie.
        """
        find_parameter(self, parameter)
        names = self._ties.setdefault(str(label), [])
        if parameter not in names:
            names.append(parameter)

    def refresh(self) -> None:
        """See what a program did to this stage since the last step: wrapped, unwrapped or replaced its module."""
        wrapped = Wrapped.of(self.modules())
        if wrapped != self._wrapped:
            if (objection := wrapped.objection()) is not None:
                raise PipelineUsageError(f"stage {self.stage_index} {objection}")
            self._wrapped, self._adapter = wrapped, wrapped.adapter()
        if self._known != (self.modules(), self.dw_builder, self._meter, self._wrapped):
            self._core.set_callbacks(self._callbacks())

    def _callbacks(self) -> _C.StageCallbacks:
        # The callbacks hold the module and not the stage: the garbage collector does not see into the runtime.
        self._known = (self.modules(), self.dw_builder, self._meter, self._wrapped)
        self._exchange.modules = self.modules()
        adapter = self.adapter()
        forward = self.submod if adapter is None else _in_context(self.submod, adapter)
        return _C.StageCallbacks(
            forward=forward if self._meter is None else self._meter.around(self.stage_index, forward),
            flatten=flatten_output(self.stage_index),
            unflatten=rebuild_args(self.stage_index),
            unwrap=self._exchange.unwrap,
            wrap=self._exchange.wrap,
            before_backward=None if adapter is None else adapter.before_backward,
            after_backward=None if adapter is None else adapter.after_backward,
            dw_builder=self.dw_builder,
        )

    # Names that programs with loops of their own use

    def clear_runtime_states(self) -> None:
        """Drop what a step left."""
        self.output_chunks.clear()
        self._clear_caches()
        self._core.clear()

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Divide the gradients of all parameters: in a step, what the step added to them, each parameter once."""
        parameters = [parameter for module in self.modules() for parameter in module.parameters()]
        if self._gradients is not None:
            self._gradients.scale(parameters, grad_scale_factor)
        else:
            scale_gradients(parameters, grad_scale_factor)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Reduce the gradients over the data-parallel ranks, where the module is wrapped for it, then scale them."""
        if self._gradients is None:
            self.refresh()
        adapter = self.adapter()
        if adapter is not None:
            adapter.reduce_grad()
        self.scale_grads(grad_scale_factor)

    def _prepare_forward_infra(self, num_microbatches: int, *_args: Any, **_kwargs: Any) -> None:
        """For programs that call a stage without a schedule: make room for this many microbatches."""
        self.refresh()
        self._core.begin_step(num_microbatches, self.has_backward, 0)


class PipelineStage(_PipelineStageBase):
    """A stage whose module was split off by hand.

    Args:
        submodule: the stage's part of the model. Its positional inputs are the outputs of the stage before it.
        stage_index: which stage this is, from 0.
        num_stages: how many stages the model has.
        device: where the module is.
        input_args: accepted for torch's sake, as the next three are. Shapes and dtypes are taken from what is sent.
        output_args: as ``input_args``.
        output_grads: as ``input_args``.
        input_grads: as ``input_args``.
        group: the process group of the pipeline; the default group if None.
        dw_builder: returns, once a microbatch, the function that computes the weight gradients, as in torch.
        get_mesh: ``get_mesh(mesh_dim_names, mesh_layout)`` returns this rank's mesh for a DTensor that another stage
            sent. Without it the mesh is one of this stage's parameters' or inputs', or a part of one.
    """

    def __init__(
        self,
        submodule: torch.nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        input_args: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        output_args: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        output_grads: torch.Tensor | tuple[torch.Tensor | None, ...] | None = None,
        input_grads: torch.Tensor | tuple[torch.Tensor | None, ...] | None = None,
        group: dist.ProcessGroup | None = None,
        dw_builder: Callable[[], Callable[..., None]] | None = None,
        get_mesh: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, group, dw_builder, get_mesh)
        self._exchange.saw(tree_leaves((input_args, output_args, output_grads, input_grads)))


class _PipelineStage(_PipelineStageBase):
    """A stage that the tracer made; its inputs and outputs are wired as the traced graph says."""

    def __init__(
        self,
        stage_module: torch.nn.Module,
        stage_index: int,
        pipe_info: Any,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._wiring = stage_wiring(pipe_info, stage_index)
        self.pipe_info = pipe_info
        super().__init__(stage_module, stage_index, pipe_info.num_stages, device, group)
        if not any(tensor.is_meta for tensor in (*self.submod.parameters(), *self.submod.buffers())):
            self.submod.to(self.device)

    @property
    def wiring(self) -> StageWiring | None:
        return self._wiring

    def tied_parameters(self) -> tuple[tuple[tuple[int, str], ...], ...]:
        """The parameters of the model that several stages use: of each, (stage, name in that stage) for every one.

        The same on every rank. Each stage has a copy of its own, so the gradients of all of them make up the model's.
        """
        return getattr(self.pipe_info, "tied_parameters", ())


def build_stage(
    stage_module: torch.nn.Module,
    stage_index: int,
    pipe_info: Any,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> _PipelineStage:
    """A stage from a module that the tracer split off, and ``pipe.info()``."""
    return _PipelineStage(stage_module, stage_index, pipe_info, device, group)


def _in_context(module: torch.nn.Module, adapter: DataParallelAdapter) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with adapter.forward_context() or nullcontext():
            return module(*args, **kwargs)

    return forward


def _check_arguments(submodule: Any, stage_index: Any, num_stages: Any, dw_builder: Any) -> None:
    if not isinstance(submodule, torch.nn.Module):
        raise PipelineTypeError(f"submodule must be a torch.nn.Module, got {type(submodule).__name__}")
    for name, value in (("stage_index", stage_index), ("num_stages", num_stages)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise PipelineTypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= stage_index < num_stages:
        raise PipelineUsageError(
            f"Stage index {stage_index} is out of range of {num_stages}: stages are numbered 0 to {num_stages - 1}"
        )
    if dw_builder is not None and not callable(dw_builder):
        raise PipelineTypeError(f"dw_builder must be callable, got {type(dw_builder).__name__}")
