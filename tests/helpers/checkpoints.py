"""A model's weights written in every form that can be read again, and mappings that note what is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

State = Mapping[str, Tensor]


class Noted(Mapping[str, Tensor]):
    """A mapping that notes the names whose tensors are asked for."""

    def __init__(self, state: State) -> None:
        self.state, self.read = state, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def __contains__(self, name: object) -> bool:
        return name in self.state


def write_shards(state: State, folder: Path, kind: str, write: Callable[[State, Path], None]) -> dict[str, Path]:
    """A file a tensor, and an index; the files by the names of what they hold."""
    folder.mkdir(exist_ok=True)
    files = {name: folder / f"shard-{number}.{kind.rpartition('.')[2]}" for number, name in enumerate(state)}
    for name, file in files.items():
        write({name: state[name]}, file)
    index = {"weight_map": {name: file.name for name, file in files.items()}}
    (folder / f"{kind}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return files


def write_safetensors(state: State, file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in state.items()}, file)


def write_torch(state: State, file: Path) -> None:
    torch.save(dict(state), file)


def _in(folder: Path, name: str) -> Path:
    folder.mkdir()
    return folder / name


def write(form: str, state: State, folder: Path) -> object:
    """Write the state in one of FORMS, and return what ``weights=`` is given."""
    where = folder / form.replace(" ", "_")
    return FORMS[form](state, where)


def _as_torch_file(state: State, where: Path) -> object:
    write_torch(state, _in(where, "weights.pt"))
    return str(where / "weights.pt")


def _as_safetensors(state: State, where: Path) -> object:
    write_safetensors(state, _in(where, "model.safetensors"))
    return where / "model.safetensors"


def _as_safetensors_index(state: State, where: Path) -> object:
    write_shards(state, where, "model.safetensors", write_safetensors)
    return where / "model.safetensors.index.json"


def _as_folder_of_shards(state: State, where: Path) -> object:
    write_shards(state, where, "pytorch_model.bin", write_torch)
    return where


def _as_distributed(state: State, where: Path) -> object:
    dcp.save(dict(state), checkpoint_id=where, no_dist=True)
    return where


def _as_function(state: State, where: Path) -> object:
    return state.__getitem__


FORMS: dict[str, Callable[[State, Path], object]] = {
    "torch file": _as_torch_file,
    "safetensors": _as_safetensors,
    "safetensors index": _as_safetensors_index,
    "folder of shards": _as_folder_of_shards,
    "distributed": _as_distributed,
    "mapping": lambda state, _: state,
    "function": _as_function,
}
