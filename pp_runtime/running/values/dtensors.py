"""DTensors between stages: their shards travel, and become DTensors again on the receiver's mesh.

    sender    DTensor (placements, global shape, mesh)  ->  local shard + (mesh names, mesh layout, placements, shape)
    receiver  local shard + ...                         ->  DTensor on the receiver's mesh of those names and layout

Activations and gradients each bring their own placements, and nothing is redistributed: a gradient that autograd left
Partial stays Partial. As in torch, a mesh is named by its dimension names and its layout, which mean, on each rank, the
group of that kind that the rank is in.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pp_runtime.errors import StageInputError
from pp_runtime.running.values.special_tensors import is_dtensor, local_part, waited_for

MeshKey = tuple[tuple[str, ...], Any]
"""The names of a mesh's dimensions, and its layout."""


@dataclass(frozen=True, slots=True)
class DTensorMeta:
    """What makes a DTensor of a local shard."""

    mesh: MeshKey
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class DTensorExchange:
    """Takes the DTensors of one stage's messages apart and puts them together, on meshes that it has seen or asks for.

    ``get_mesh(mesh_dim_names, mesh_layout)`` is the user's, as torch calls it.
    """

    def __init__(self, stage_index: int, get_mesh: Callable[..., Any] | None = None) -> None:
        self._stage_index = stage_index
        self._get_mesh = get_mesh
        self._meshes: dict[MeshKey, Any] = {}
        self.modules: Sequence[torch.nn.Module] = ()

    def saw(self, values: Any) -> None:
        """Remember the meshes of the DTensors among these."""
        for value in values:
            if is_dtensor(value):
                self._remember(value.device_mesh)

    def unwrap(self, tensors: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor | None], bytes]:
        """What travels in place of the tensors; and how the receiver makes the DTensors of it, empty if none is one."""
        metas: list[DTensorMeta | None] = []
        plain: list[torch.Tensor | None] = []
        for tensor in tensors:
            if is_dtensor(tensor):
                metas.append(self._meta_of(tensor))
                plain.append(local_part(tensor).detach())
            else:
                metas.append(None)
                plain.append(waited_for(tensor))
        return plain, pickle.dumps(metas) if any(metas) else b""

    def wrap(self, tensors: Sequence[torch.Tensor | None], metas: bytes) -> list[torch.Tensor | None]:
        """The tensors that ``unwrap`` was given on the sender, over what came."""
        return [
            tensor if meta is None or tensor is None else self._dtensor(tensor, meta)
            for tensor, meta in zip(tensors, pickle.loads(metas), strict=True)
        ]

    def _meta_of(self, tensor: Any) -> DTensorMeta:
        self._remember(tensor.device_mesh)
        return DTensorMeta(_key(tensor.device_mesh), tensor.placements, tensor.shape, tensor.stride())

    def _dtensor(self, local: torch.Tensor, meta: DTensorMeta) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        # Not in the graph: its backward would redistribute the gradient into these placements.
        with torch.no_grad():
            return DTensor.from_local(
                local, self._mesh(meta.mesh), meta.placements, run_check=False, shape=meta.shape, stride=meta.stride
            )

    def _remember(self, mesh: Any) -> None:
        self._meshes.setdefault(_key(mesh), mesh)

    def _mesh(self, key: MeshKey) -> Any:
        if key not in self._meshes:
            self._meshes[key] = self._asked_for(key) if self._get_mesh is not None else self._found(key)
        return self._meshes[key]

    def _asked_for(self, key: MeshKey) -> Any:
        assert self._get_mesh is not None
        mesh = self._get_mesh(*key)
        if mesh is None or _key(mesh) != key:
            got = "None" if mesh is None else f"a mesh of {_text(_key(mesh))}"
            raise StageInputError(
                f"stage {self._stage_index} receives a DTensor on a mesh of {_text(key)}, and get_mesh gave {got} for "
                "it: let get_mesh return this rank's mesh of those names and that layout",
                stage=self._stage_index,
            )
        return mesh

    def _found(self, key: MeshKey) -> Any:
        """A mesh of a parameter, of an input, or a part of one."""
        for mesh in self._near():
            if _key(mesh) == key:
                return mesh
            names = mesh.mesh_dim_names or ()
            if key[0] and key[0] != tuple(names) and set(key[0]) <= set(names):
                part = mesh[key[0]]
                if _key(part) == key:
                    return part
        raise StageInputError(
            f"stage {self._stage_index} receives a DTensor on a mesh of {_text(key)}, and none of its inputs and "
            "parameters is on such a mesh: pass PipelineStage(..., get_mesh=function), which returns this rank's mesh "
            "for (mesh_dim_names, mesh_layout)",
            stage=self._stage_index,
        )

    def _near(self) -> Iterator[Any]:
        seen = list(self._meshes.values())
        seen += [p.device_mesh for module in self.modules for p in module.parameters() if is_dtensor(p)]
        for mesh in seen:
            yield mesh
            root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
            if root is not mesh:
                yield root


def _key(mesh: Any) -> MeshKey:
    return tuple(mesh.mesh_dim_names or ()), getattr(mesh, "_layout", None)


def _text(key: MeshKey) -> str:
    return f"dimensions {key[0]} and layout {key[1]}"
