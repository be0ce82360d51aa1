"""Clipping gradients by their norm over all stages, each gradient counted once however it is laid out.

plain tensor          whole: counted on its rank of the pipeline's group; data-parallel ranks hold the same one
sharded DTensor       the shards' norms are reduced over the mesh dimensions that it is sharded on
replicated DTensor    counted once
partial DTensor       added up first
tied parameter        counted in the stage that has it first; every copy holds the sum of all gradients

norm^p = sum over the pipeline's ranks of (sum over a rank's gradients of (sum over shards of |g|^p))
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.running.agreement import group_or_world, groups_of_stages
from pp_runtime.running.gradients.tied import counted_elsewhere
from pp_runtime.running.held_stage import HeldStage
from pp_runtime.running.values import is_dtensor, local_part

Clipped = HeldStage | torch.nn.Module | torch.Tensor


@torch.no_grad()
def clip_grad_norm_(
    parameters_or_stages: Clipped | Iterable[Clipped],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Scale the gradients of all stages in place, so that their common norm is at most ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_`` of the whole model. Every rank of the pipeline calls it after ``step()``, also
    one whose stages have no gradients. It is collective over the pipeline's group, and over the meshes of DTensors.

    Args:
        parameters_or_stages: this rank's stages; or modules, or parameters, if ``group`` is given or all stages of this
            process are of one group. A stage brings the parameters of a loss function that is a module.
        max_norm: the largest norm allowed.
        norm_type: p of the p-norm, above 0, or ``inf``.
        error_if_nonfinite: raise RuntimeError, on every rank, where the norm is infinite or not a number.
        foreach: as in torch: fused operations where they can be (None), or never (False).
        group: the pipeline's process group; that of the stages if not given.

    Returns:
        The norm before clipping, the same on every rank: float64 where any gradient is, else float32.
    """
    given = _listed(parameters_or_stages)
    order = float(norm_type)
    if not order > 0:
        raise PipelineUsageError(f"norm_type is {norm_type}: give it a number above 0, or float('inf')")
    parameters = _parameters_of(given)
    world = group_or_world(group) if group is not None else _group_of(given)
    device = _device_of(given, parameters, world)

    total = _total_norm([p for p in parameters if not counted_elsewhere(p)], order, world, device, foreach)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(
            f"The total norm of order {order} for the gradients of all stages is non-finite, so it cannot be clipped. "
            "To scale them by it anyway, set error_if_nonfinite=False"
        )
    gradients = [_storage(p.grad) for p in parameters if p.grad is not None]
    _scale(gradients, (float(max_norm) / (total + 1e-6)).clamp(max=1.0), foreach)
    return total


def _listed(given: Any) -> list[Clipped]:
    single = isinstance(given, (HeldStage, torch.nn.Module, torch.Tensor))
    return [given] if single else list(given)


def _parameters_of(given: Sequence[Clipped]) -> list[torch.Tensor]:
    """Each parameter once."""
    found: dict[int, torch.Tensor] = {}
    for each in given:
        if isinstance(each, torch.Tensor):
            found[id(each)] = each
            continue
        if not isinstance(each, (HeldStage, torch.nn.Module)):
            raise PipelineTypeError(
                f"clip_grad_norm_ takes stages, modules or parameters, got {each!r} of type {type(each).__name__}"
            )
        modules = each.modules() if isinstance(each, HeldStage) else (each,)
        for module in modules:
            _refuse_flat(module)
            found.update((id(parameter), parameter) for parameter in module.parameters())
    return list(found.values())


def _refuse_flat(module: torch.nn.Module) -> None:
    # Where nobody imported FSDP there is none; importing it takes a while.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in module.modules()):
        raise PipelineUsageError(
            "clip_grad_norm_ cannot tell the shards of FullyShardedDataParallel from whole gradients: shard the stage "
            "with fully_shard (FSDP2), whose gradients are DTensors"
        )


def _group_of(given: Sequence[Clipped]) -> dist.ProcessGroup:
    stages = [each for each in given if isinstance(each, HeldStage)]
    groups = {group_or_world(stage.group) for stage in stages} or set(groups_of_stages())
    if len(groups) > 1:
        raise PipelineUsageError(
            f"these gradients may be of {len(groups)} pipelines, whose stages have different process groups: pass the "
            "stages of one, or group="
        )
    return groups.pop() if groups else group_or_world(None)


def _device_of(given: Sequence[Clipped], parameters: Sequence[torch.Tensor], group: dist.ProcessGroup) -> torch.device:
    """Where the group's collectives can be: with the gradients, which a rank need not have."""
    for each in given:
        if isinstance(each, HeldStage):
            return each.device
    return parameters[0].device if parameters else group._device_types[0]


@dataclass(slots=True)
class _Shards:
    """Gradients that are sharded alike: their norm is reduced over these dimensions of this mesh."""

    mesh: Any = None
    dims: tuple[int, ...] = ()
    tensors: list[torch.Tensor] = field(default_factory=list)


def _total_norm(
    parameters: Sequence[Any], order: float, group: dist.ProcessGroup, device: torch.device, foreach: bool | None
) -> torch.Tensor:
    """The norm over the group, of these parameters' gradients on this rank."""
    # A scalar costs nothing in float64, where the device has it.
    wide = torch.float32 if device.type == "mps" else torch.float64
    operation = dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM
    alike: dict[tuple[Any, tuple[int, ...]], _Shards] = {(None, ()): _Shards()}
    doubles = any(p.grad is not None and p.grad.dtype == torch.float64 for p in parameters)
    for parameter in parameters:
        gradient = parameter.grad
        layout = gradient if gradient is not None else parameter
        mesh, dims = _sharded_dims(layout) if is_dtensor(layout) else (None, ())
        # Also without a gradient: the mesh's other ranks may have one, and would wait.
        shards = alike.setdefault((mesh, dims), _Shards(mesh, dims))
        if gradient is not None:
            shards.tensors.append(_elements(gradient))
    total = torch.zeros(2, dtype=wide, device=device)
    for shards in alike.values():
        powers = _powers(shards.tensors, order, foreach).to(device, wide)
        # Some backends' MAX passes a NaN over.
        powers = torch.stack([powers.nan_to_num(nan=0.0, posinf=math.inf), powers.isnan().to(wide)])
        for dim in shards.dims:
            dist.all_reduce(powers, operation, group=shards.mesh.get_group(dim))
        total = torch.maximum(total, powers) if math.isinf(order) else total + powers
    told = torch.cat([total, torch.tensor([float(doubles)], dtype=wide, device=device)])
    dist.all_reduce(told, operation, group=group)
    power, not_numbers, double = told
    norm = power if math.isinf(order) else power ** (1.0 / order)
    norm = torch.where(not_numbers > 0, math.nan, norm)
    return norm if double.item() else norm.float()


def _powers(tensors: Sequence[torch.Tensor], order: float, foreach: bool | None) -> torch.Tensor:
    """The sum of all elements' powers, or the largest absolute value; 0 of no tensors."""
    norms: list[torch.Tensor] = []
    for (dtype, _), same in _alike(tensor for tensor in tensors if tensor.numel()):
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else None
        if foreach is False:
            norms += [torch.linalg.vector_norm(tensor, order, dtype=wide) for tensor in same]
        else:
            norms += torch._foreach_norm(same, order, dtype=wide)
    if not norms:
        return torch.zeros(())
    each = torch.stack([norm.to(norms[0].device, torch.promote_types(norm.dtype, torch.float32)) for norm in norms])
    return each.max() if math.isinf(order) else (each.double() ** order).sum()


def _scale(tensors: Sequence[torch.Tensor], factor: torch.Tensor, foreach: bool | None) -> None:
    for (_, device), same in _alike(tensors):
        if foreach is False:
            for tensor in same:
                tensor.mul_(factor.to(device))
        else:
            torch._foreach_mul_(same, factor.to(device))


def _alike(tensors: Iterable[torch.Tensor]) -> Iterable[tuple[tuple[torch.dtype, torch.device], list[torch.Tensor]]]:
    """By what a fused operation takes together."""
    found: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return found.items()


def _sharded_dims(layout: Any) -> tuple[Any, tuple[int, ...]]:
    """A DTensor's mesh, and the dimensions of it on which ranks hold different elements."""
    mesh = layout.device_mesh
    places = enumerate(layout.placements)
    return mesh, tuple(
        dim for dim, place in places if not place.is_replicate() and not place.is_partial() and mesh.size(dim) > 1
    )


def _elements(gradient: Any) -> torch.Tensor:
    """This rank's elements of a gradient, added up where ranks hold parts of a sum and where indices repeat."""
    if is_dtensor(gradient):
        from torch.distributed.tensor import Replicate

        if any(place.is_partial() for place in gradient.placements):
            places = [Replicate() if place.is_partial() else place for place in gradient.placements]
            gradient = gradient.redistribute(placements=places)
        return local_part(gradient)
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _storage(gradient: Any) -> torch.Tensor:
    """What to scale, in place: scaling commutes with sums."""
    if is_dtensor(gradient):
        return local_part(gradient)
    return gradient._values() if gradient.is_sparse else gradient
