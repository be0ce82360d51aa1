"""Where a model's weights are read from, tensor by tensor: files, folders, mappings and functions.

Whatever holds them, only the tensors that are asked for are read, so a rank reads its own stages' and no others.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pp_runtime.errors import PipelineTypeError, PipelineUsageError

_IN_FOLDERS = (
    (".metadata",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Names of checkpoints in a folder, a row a format."""


class Weights(ABC):
    """An opened checkpoint. Made by :func:`open_weights`."""

    description: str
    """What it is, for errors."""

    @abstractmethod
    def names(self) -> Collection[str] | None:
        """All that it holds; None where it cannot tell."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, and no others; those that it does not hold are left out.

        They may be views of a file, which is read when they are.
        """


def open_weights(weights: Any, *, rename: Callable[[str], str | None] | None = None) -> Weights:
    """Open a checkpoint of a whole model, to read some of its tensors.

    Args:
        weights: a mapping from names to tensors; a function from a name to a tensor, which raises KeyError for a name
            that it does not know; or the path of a file of ``torch.save`` (mapped, not read; only weights, no code), of
            a ``.safetensors`` file, of an index (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``)
            whose shards are opened as they are needed, of a folder with one of these, or of a folder of
            ``torch.distributed.checkpoint``.
        rename: from a name in the checkpoint to the model's, or to None for what is to be left out.

    Safetensors come before a ``pytorch_model.bin`` in the same folder. Raises PipelineUsageError for what is not there,
    cannot be read or could be one of two.
    """
    opened = _open(weights)
    return opened if rename is None else _Renamed(opened, rename)


def _open(weights: Any) -> Weights:
    if isinstance(weights, Weights):
        return weights
    if isinstance(weights, Mapping):
        return _InMapping(weights, "the mapping of weights")
    if isinstance(weights, (str, os.PathLike)):
        return _open_path(Path(weights))
    if callable(weights):
        return _FromFunction(weights)
    raise PipelineTypeError(
        f"weights are a path, a mapping from names to tensors or a function from a name to a tensor, not a "
        f"{type(weights).__name__}"
    )


def _open_path(path: Path) -> Weights:
    if path.is_dir():
        path = _in_folder(path)
    if path.name == ".metadata":
        return _InDistributedCheckpoint(path.parent)
    if not path.is_file():
        raise PipelineUsageError(f"there are no weights at {path}: it is neither a file nor a folder")
    if path.name.endswith(".index.json"):
        return _InShards(path)
    if path.suffix == ".safetensors":
        return _InSafetensors(path)
    return _InMapping(_mapped(path), str(path))


def _in_folder(folder: Path) -> Path:
    rows = [[folder / name for name in row if (folder / name).exists()] for row in _IN_FOLDERS]
    found = [row for row in rows if row]
    if not found:
        known = ", ".join(name for row in _IN_FOLDERS for name in row)
        raise PipelineUsageError(f"the folder {folder} has no weights: name the file, if it is none of {known}")
    either = [each for row in (found if rows[0] else found[:1]) for each in row]
    if len(either) > 1:
        raise PipelineUsageError(
            f"the folder {folder} has {' and '.join(each.name for each in either)}, which may differ: name the one"
        )
    return either[0]


def _mapped(path: Path) -> Mapping[str, Any]:
    """What torch.save wrote, its tensors over the file."""
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise PipelineUsageError(
            f"{path} is no file of tensors that torch.save wrote and that can be mapped: read it and give its mapping "
            f"of names to tensors ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(loaded, Mapping):
        raise PipelineUsageError(f"{path} holds a {type(loaded).__name__}, not a mapping from names to tensors")
    return loaded


class _InMapping(Weights):
    def __init__(self, mapping: Mapping[str, Any], description: str) -> None:
        self._mapping, self.description = mapping, description

    def names(self) -> Collection[str]:
        return self._mapping.keys()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._mapping[name] for name in names if name in self._mapping}


class _FromFunction(Weights):
    description = "the function of weights"

    def __init__(self, function: Callable[[str], Tensor]) -> None:
        self._function = function

    def names(self) -> None:
        return None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            try:
                found[name] = self._function(name)
            except KeyError:
                continue
        return found


class _InSafetensors(Weights):
    def __init__(self, path: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise PipelineUsageError(
                f"{path} is read by safetensors, which is not installed: pip install safetensors"
            ) from error
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise PipelineUsageError(f"{path} is no file of safetensors: {error}") from error
        self.description = str(path)
        self._names = frozenset(self._file.keys())

    def names(self) -> Collection[str]:
        return self._names

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._file.get_tensor(name) for name in names if name in self._names}


class _InShards(Weights):
    """An index of names, and files that are opened when one of theirs is read."""

    def __init__(self, index: Path) -> None:
        self.description = str(index)
        try:
            self._shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise PipelineUsageError(f'{index} is no index: it has no "weight_map" from names to files') from error
        self._folder = index.parent

    def names(self) -> Collection[str]:
        return self._shard_of.keys()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_shard: dict[str, list[str]] = {}
        for name in names:
            if name in self._shard_of:
                by_shard.setdefault(self._shard_of[name], []).append(name)
        # No shard is kept open: its pages go with the last of its tensors.
        return {name: tensor for shard, held in by_shard.items() for name, tensor in self._read(shard, held).items()}

    def _read(self, file: str, names: list[str]) -> dict[str, Tensor]:
        path = self._folder / file
        if not path.is_file():
            raise PipelineUsageError(f"{path} is missing, which {self.description} says has {names[0]}")
        found = _open_path(path).read(names)
        lacking = [name for name in names if name not in found]
        if lacking:
            raise PipelineUsageError(f"{path} lacks {lacking[0]}, which {self.description} says it has")
        return found


class _InDistributedCheckpoint(Weights):
    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self.description = f"the distributed checkpoint {folder}"
        self._reader = FileSystemReader(folder)

    @cached_property
    def _tensors(self) -> Mapping[str, Any]:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        known = self._reader.read_metadata().state_dict_metadata
        return {name: each for name, each in known.items() if isinstance(each, TensorStorageMetadata)}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import CheckpointException

        kinds = {name: self._tensors[name] for name in names if name in self._tensors}
        found = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in kinds.items()}
        if not found:
            return found
        try:
            with warnings.catch_warnings():  # that it is read without other ranks, which is meant
                warnings.simplefilter("ignore", UserWarning)
                dcp.load(found, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            reasons = ", ".join(str(reason) for reason, _ in error.failures.values())
            raise PipelineUsageError(f"{self.description} cannot be read: {reasons}") from error
        return found


class _Renamed(Weights):
    def __init__(self, weights: Weights, rename: Callable[[str], str | None]) -> None:
        listed = weights.names()
        if listed is None:
            raise PipelineUsageError(f"{weights.description} does not list its names: rename in the function itself")
        self._weights, self.description = weights, f"{weights.description}, renamed"
        self._original: dict[str, str] = {}
        for name in listed:
            renamed = rename(name)
            if renamed in self._original:
                raise PipelineUsageError(f"rename gives {self._original[renamed]} and {name} one name, {renamed}")
            if renamed is not None:
                self._original[renamed] = name

    def names(self) -> Collection[str]:
        return self._original.keys()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = {self._original[name]: name for name in names if name in self._original}
        return {wanted[name]: tensor for name, tensor in self._weights.read(wanted).items()}
