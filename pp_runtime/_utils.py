"""Helpers that programs take from torch.distributed.pipelining._utils: flat arguments, placements, tensor metadata."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from pp_runtime.errors import PipeliningMetadataError
from pp_runtime.orders import looped, stages_of_rank, v_shaped
from pp_runtime.running import is_dtensor

if TYPE_CHECKING:
    from torch import fx

__all__ = [
    "PipeInfo",
    "PipeliningMetadataError",
    "TensorMeta",
    "extract_tensor_meta",
    "flatten_args",
    "flatten_args_detach",
    "generate_rank_to_stage_mapping",
    "generate_stage_to_rank_mapping",
]


def flatten_args(args: Any, *, detach: bool = False) -> Any:
    """The leaves of ``args``; with ``detach`` the pair (``args`` anew, its leaves), tensors detached.

    A detached tensor needs a gradient if the tensor did.
    """
    flat, tree = tree_flatten(args)
    if not detach:
        return flat
    flat = [
        value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for value in flat
    ]
    return tree_unflatten(flat, tree), flat


def flatten_args_detach(args: Any) -> tuple[Any, list[Any]]:
    """``flatten_args(args, detach=True)``."""
    return flatten_args(args, detach=True)


def generate_stage_to_rank_mapping(pp_size: int, num_stages: int, style: str = "loop") -> dict[int, int]:
    """The rank of each stage, for stages that go round the ranks (``"loop"``) or down and up again (``"v"``)."""
    if style not in ("loop", "v"):
        raise ValueError(f"'{style}' is not a style of placement; the styles are 'loop' and 'v'.")
    return dict(enumerate((looped if style == "loop" else v_shaped)(pp_size, num_stages)))


def generate_rank_to_stage_mapping(pp_size: int, num_stages: int, style: str = "loop") -> dict[int, list[int]]:
    """The stages of each rank, lowest first; a rank without a stage is left out."""
    placement = tuple(generate_stage_to_rank_mapping(pp_size, num_stages, style).values())
    return {rank: stages_of_rank(placement, rank) for rank in dict.fromkeys(placement)}


@dataclass(slots=True)
class PipeInfo:
    """What a stage must know of the traced model that it is a part of."""

    graph: fx.Graph
    num_stages: int
    has_loss_and_backward: bool


@dataclass(frozen=True, slots=True)
class _TensorMeta:
    """What a tensor is like, without its values. Of a DTensor, what this rank's own part is like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @staticmethod
    def from_tensor(tensor: torch.Tensor) -> _TensorMeta:
        """Of a plain tensor; PipeliningMetadataError for a DTensor."""
        if is_dtensor(tensor):
            raise PipeliningMetadataError("a DTensor is described by _DTensorMeta.from_dtensor, not by _TensorMeta")
        return _TensorMeta(tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)

    def to_tensor(self, device: torch.device | str) -> torch.Tensor:
        """An empty tensor like this."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return tensor.requires_grad_(self.requires_grad and tensor.is_floating_point())

    def get_diff(self, other: _TensorMeta) -> list[str]:
        """What differs, one text a property; whether a gradient is needed does not count."""
        found = _differences(self, other, ("shape", "stride", "dtype"))
        if isinstance(self, _DTensorMeta):
            if isinstance(other, _DTensorMeta):
                found += _differences(self, other, _GLOBAL_PROPERTIES)
            else:
                found.append("type: _DTensorMeta vs _TensorMeta")
        return found


@dataclass(frozen=True, slots=True)
class _DTensorMeta(_TensorMeta):
    """What a DTensor is like: this rank's part, the whole, and how the whole is spread over which mesh."""

    global_shape: torch.Size = torch.Size([])
    global_stride: tuple[int, ...] = ()
    placements: tuple[Any, ...] = ()
    mesh_dim_names: tuple[str, ...] = ()
    mesh_layout: Any = None

    @staticmethod
    def from_dtensor(dtensor: Any) -> _DTensorMeta:
        """Of a DTensor."""
        local, mesh = dtensor._local_tensor, dtensor.device_mesh
        return _DTensorMeta(
            local.shape,
            local.stride(),
            dtensor.dtype,
            dtensor.requires_grad,
            dtensor.shape,
            dtensor.stride(),
            tuple(dtensor.placements),
            tuple(mesh.mesh_dim_names or ()),
            mesh._layout,
        )

    @property
    def mesh_cache_key(self) -> tuple[tuple[str, ...], Any]:
        """What tells one mesh from another."""
        return self.mesh_dim_names, self.mesh_layout

    def to_dtensor(self, device: torch.device | str, mesh: Any) -> Any:
        """An empty DTensor like this, on a mesh."""
        from torch.distributed.tensor import DTensor

        local = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        whole = DTensor.from_local(
            local, mesh, self.placements, run_check=False, shape=self.global_shape, stride=self.global_stride
        )
        return whole.requires_grad_(self.requires_grad and whole.is_floating_point())


TensorMeta = _TensorMeta | _DTensorMeta
_GLOBAL_PROPERTIES = tuple(field.name for field in fields(_DTensorMeta)[len(fields(_TensorMeta)) :])


def extract_tensor_meta(tensor: torch.Tensor) -> TensorMeta:
    """Of a plain tensor or a DTensor."""
    return _DTensorMeta.from_dtensor(tensor) if is_dtensor(tensor) else _TensorMeta.from_tensor(tensor)


def _differences(one: Any, other: Any, names: tuple[str, ...]) -> list[str]:
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in names)
    return [f"{name} mismatch: {mine} vs {others}" for name, mine, others in pairs if mine != others]
