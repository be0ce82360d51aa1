"""Data parallelism under the pipeline: when DDP, replicate and FSDP2 modules gather weights and reduce gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
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

        ``outputs`` have the graph that the last one runs; only DDP with ``find_unused_parameters`` looks at them.
        """

    def after_backward(self, last: bool) -> None:
        """After a B, I or W."""

    def unshard(self) -> None:
        """Begin to gather the weights; the next forward or backward waits for them."""

    def reshard(self) -> None:
        """Free the gathered weights."""

    def reduce_grad(self) -> None:
        """After the stage's last B or W: reduce the gradients, where that has not begun by itself."""

    def keeps_gradients(self) -> bool:
        """Whether a gradient set aside would be written over, since it lies in a buffer of the module's own."""
        return False


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

    def keeps_gradients(self) -> bool:
        return any(module.gradient_as_bucket_view for module in self._modules)


class ComposableReplicaAdapter(DataParallelAdapter):
    """For ``torch.distributed._composable.replicate``: a DDP beside the module, in hooks around its forward."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self._modules = modules

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        states = [_replica_state(module) for module in self._modules]
        before = [state._no_sync for state in states]
        for state in states:
            state._no_sync = True
        try:
            yield
        finally:
            for state, no_sync in zip(states, before, strict=True):
                state._no_sync = no_sync

    def before_backward(self, last: bool, outputs: Sequence[torch.Tensor] = ()) -> None:
        if last:
            for replica in self._replicas():
                replica.reducer.prepare_for_backward(list(outputs))

    def keeps_gradients(self) -> bool:
        return any(replica.gradient_as_bucket_view for replica in self._replicas())

    def _replicas(self) -> list[DistributedDataParallel]:
        """Each module's DDP, which its first forward makes."""
        states = map(_replica_state, self._modules)
        return [state._ddp for state in states if state.has_initialized]


class ShardedAdapter(DataParallelAdapter):
    """For FSDP2's ``fully_shard`` and its ``replicate``: gathers and reduces only where the order says so."""

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


class _Together(DataParallelAdapter):
    """Several adapters of one stage, of modules that are wrapped in different ways."""

    def __init__(self, adapters: Sequence[DataParallelAdapter]) -> None:
        self._adapters = adapters

    def forward_context(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        for adapter in self._adapters:
            stack.enter_context(adapter.forward_context())
        return stack

    def before_backward(self, last: bool, outputs: Sequence[torch.Tensor] = ()) -> None:
        for adapter in self._adapters:
            adapter.before_backward(last, outputs)

    def after_backward(self, last: bool) -> None:
        for adapter in self._adapters:
            adapter.after_backward(last)

    def unshard(self) -> None:
        for adapter in self._adapters:
            adapter.unshard()

    def reshard(self) -> None:
        for adapter in self._adapters:
            adapter.reshard()

    def reduce_grad(self) -> None:
        for adapter in self._adapters:
            adapter.reduce_grad()

    def keeps_gradients(self) -> bool:
        return any(adapter.keeps_gradients() for adapter in self._adapters)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """The data-parallel modules of a stage, of each kind those that stand in no other one of that kind."""

    sharded: tuple[Any, ...] = ()
    replicated: tuple[DistributedDataParallel, ...] = ()
    composable: tuple[torch.nn.Module, ...] = ()
    flat: tuple[torch.nn.Module, ...] = ()  # of the first FSDP, those that shard

    @staticmethod
    def of(modules: Iterable[torch.nn.Module]) -> Wrapped:
        """Those in some modules. It is asked at every step, since a program may wrap and unwrap between steps."""
        found: dict[_Kind, list[Any]] = {kind: [] for kind in _KINDS}
        kind_of: dict[type, _Kind] = {}
        seen: set[int] = set()
        to_visit: list[tuple[torch.nn.Module, _Kind]] = [(module, 0) for module in modules]
        to_visit.reverse()
        while to_visit:
            module, inside = to_visit.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            cls = type(module)
            kind = kind_of.get(cls)
            if kind is None:
                kind = kind_of[cls] = _kind_of(cls)
            if kind and not kind & inside:
                found[kind].append(module)
                inside |= kind
            if children := module._modules:
                to_visit += [(child, inside) for child in reversed(children.values()) if child is not None]
        flat = [module for module in found[_FLAT] if module.sharding_strategy.name != "NO_SHARD"]
        return Wrapped(tuple(found[_SHARDED]), tuple(found[_REPLICATED]), tuple(found[_COMPOSABLE]), tuple(flat))

    def objection(self) -> str | None:
        """Why a stage with these cannot run; None if it can."""
        if any(module.static_graph for module in self.replicated):
            return (
                "is in a DistributedDataParallel with static_graph=True, which takes each microbatch for an iteration: "
                "leave static_graph out"
            )
        if self.flat:
            return (
                "is in a FullyShardedDataParallel, which frees weights that other microbatches still need: "
                "use torch.distributed.fsdp.fully_shard"
            )
        return None

    def adapter(self) -> DataParallelAdapter | None:
        """What they need around the pipeline's actions; None if there are none."""
        adapters: list[DataParallelAdapter] = []
        if self.sharded:
            adapters.append(ShardedAdapter(self.sharded))
        if self.replicated:
            adapters.append(ReplicatedAdapter(self.replicated))
        if self.composable:
            adapters.append(ComposableReplicaAdapter(self.composable))
        return _Together(adapters) if len(adapters) > 1 else adapters[0] if adapters else None


_Kind = int
_SHARDED, _REPLICATED, _COMPOSABLE, _FLAT = _KINDS = (1, 2, 4, 8)


def _kind_of(cls: type) -> _Kind:
    if issubclass(cls, DistributedDataParallel):
        return _REPLICATED
    # Importing FSDP and replicate takes a while; where nobody has, no module is of them.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(cls, fsdp.FSDPModule):
        return _SHARDED
    if fsdp is not None and issubclass(cls, fsdp.FullyShardedDataParallel):
        return _FLAT
    composable = sys.modules.get("torch.distributed._composable.replicate")
    return _COMPOSABLE if composable is not None and issubclass(cls, composable.DDP) else 0


def _sharded_modules(root: torch.nn.Module) -> Iterable[Any]:
    return (module for module in root.modules() if _kind_of(type(module)) == _SHARDED)


def _replica_state(module: torch.nn.Module) -> Any:
    return sys.modules["torch.distributed._composable.replicate"].replicate.state(module)


def _parameter_groups(state: Any) -> Sequence[Any]:
    # One group a state until torch 2.12, a list since.
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    group = state._fsdp_param_group
    return () if group is None else (group,)
