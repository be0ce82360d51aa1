"""Data parallelism under the pipeline: when DDP and FSDP modules gather weights and reduce gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


class DataParallelAdapter:
    """What a stage's data-parallel modules need around the pipeline's actions; this base does nothing.

    Gradients of all microbatches are summed on each rank, and reduced over the data-parallel ranks once a step.
    """

    def forward_context(self) -> AbstractContextManager[object]:
        """Stands around the stage's forward."""
        return nullcontext()

    def before_backward(self, last: bool, outputs: Sequence[torch.Tensor] = ()) -> None:
        """Before a B, I or W. ``last`` is the stage's last B or W of the step.

        ``outputs`` are the forward's outputs; only DDP with ``find_unused_parameters`` looks at them.
        """

    def after_backward(self, last: bool) -> None:
        """After a B, I or W."""

    def unshard(self) -> None:
        """Begin to gather the weights; the next forward or backward waits for them."""

    def reshard(self) -> None:
        """Free the gathered weights."""

    def reduce_grad(self) -> None:
        """After the stage's last B or W: reduce the gradients, where that has not begun by itself."""


class ReplicatedAdapter(DataParallelAdapter):
    """For DistributedDataParallel: its hooks reduce during the last backward, and only then."""

    def __init__(self, modules: Sequence[DistributedDataParallel]) -> None:
        self._modules = modules

    def forward_context(self) -> AbstractContextManager[object]:
        # A forward outside of no_sync would make DDP reduce in the next backward, whichever microbatch that is.
        stack = ExitStack()
        for module in self._modules:
            stack.enter_context(module.no_sync())
        return stack

    def before_backward(self, last: bool, outputs: Sequence[torch.Tensor] = ()) -> None:
        if last:
            for module in self._modules:
                module.reducer.prepare_for_backward(list(outputs))


class ShardedAdapter(DataParallelAdapter):
    """For FSDP2's ``fully_shard`` and for ``replicate``: gathers and reduces only where the order says so."""

    def __init__(self, roots: Sequence[Any]) -> None:
        self._roots = roots
        self._gathering: list[Any] = []

    def forward_context(self) -> AbstractContextManager[object]:
        self._wait_for_weights()
        return nullcontext()

    def before_backward(self, last: bool, outputs: Sequence[torch.Tensor] = ()) -> None:
        self._wait_for_weights()
        self._configure(reduce=False)

    def unshard(self) -> None:
        for root in self._roots:
            for module in _sharded_modules(root):
                handle = module.unshard(async_op=True)
                if handle is not None:
                    self._gathering.append(handle)

    def reshard(self) -> None:
        self._wait_for_weights()
        for root in self._roots:
            for module in _sharded_modules(root):
                module.reshard()

    def reduce_grad(self) -> None:
        # FSDP reduces in hooks of its own backward, which were told not to; so its end of a backward is called here.
        self._configure(reduce=True)
        for root in self._roots:
            root_state = root._get_fsdp_state()
            for state in root_state._state_ctx.all_states:
                for group in _parameter_groups(state):
                    group.post_backward()
            root_state._root_post_backward_final_callback()

    def _wait_for_weights(self) -> None:
        for handle in self._gathering:
            handle.wait()
        self._gathering.clear()

    def _configure(self, *, reduce: bool) -> None:
        for root in self._roots:
            root.set_is_last_backward(reduce)
            root.set_reshard_after_backward(reduce)
            root.set_requires_gradient_sync(reduce)


def adapter_for(module: torch.nn.Module) -> DataParallelAdapter | None:
    """The adapter that the data-parallel modules in ``module`` need; None if there are none."""
    roots = list(_outermost(module, _is_sharded))
    if roots:
        return ShardedAdapter(roots)
    replicas = list(_outermost(module, lambda each: isinstance(each, DistributedDataParallel)))
    if replicas:
        return ReplicatedAdapter(replicas)
    return None


def scale_gradients(parameters: Iterable[torch.nn.Parameter], divisor: int) -> None:
    """Divide all gradients in one fused call. ``divisor`` is the number of microbatches, or 1 to leave them summed."""
    if divisor == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        with torch.no_grad():
            torch._foreach_div_(gradients, divisor)


def _outermost(module: torch.nn.Module, wanted: Any) -> Iterable[Any]:
    """The wanted modules that stand in no other wanted one."""
    if wanted(module):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, wanted)


def _is_sharded(module: torch.nn.Module) -> bool:
    # Importing FSDP takes a while; where nobody has, no module is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _sharded_modules(root: torch.nn.Module) -> Iterable[Any]:
    return (module for module in root.modules() if _is_sharded(module))


def _parameter_groups(state: Any) -> Sequence[Any]:
    # One group a state until torch 2.12, a list since.
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    group = state._fsdp_param_group
    return () if group is None else (group,)
