"""How a stage's output travels when it is not just tensors: dicts, dataclasses, nestings, numbers and text among them.

    {"hidden": t0, "scale": 2}   ->   tensors (t0,)   structure: the pickle of ({"hidden": <0>, "scale": 2},)

The tensors travel as those of any message; the rest is pickled around them, with a tensor's place in the message where
the tensor was. Pickling walks the output once, in C, which is quicker than to look up whether its structure is known;
it also gives the receiver objects of its own each time, as the sender's stage did.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch

from pp_runtime import _C
from pp_runtime.errors import StageOutputError
from pp_runtime.running.values.special_tensors import is_dtensor, local_part, waited_for


class _Pickler(pickle.Pickler):
    """Leaves the tensors out, each once, and keeps them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        place = self._places.setdefault(id(value), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(value)
        return place


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back in."""

    def __init__(self, file: io.BytesIO, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: int) -> torch.Tensor:
        return self._tensors[place]


def _take_apart(value: Any) -> tuple[tuple[torch.Tensor, ...], bytes]:
    """The tensors in an object, and the pickle of what is around them."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return tuple(pickler.tensors), file.getvalue()


def _put_together(tensors: tuple[torch.Tensor, ...], structure: bytes) -> Any:
    return _Unpickler(io.BytesIO(structure), tensors).load()


def flatten_output(stage_index: int) -> Callable[[Any], tuple[tuple[torch.Tensor, ...], bytes]]:
    """What the runtime calls for an output of this stage that is not only tensors that can be sent.

    Returns the tensors, and the structure around them. Raises StageOutputError where something in it cannot travel.
    """

    def flatten(output: Any) -> tuple[tuple[torch.Tensor, ...], bytes]:
        args = _normalize_model_output_as_tuple(output)
        try:
            tensors, structure = (args, b"") if all(map(_is_tensor, args)) else _take_apart(args)
        except Exception as error:  # whatever an object's own __reduce__ raises
            _refuse(stage_index, output, error)
        if not tensors or not all(map(_can_travel, tensors)):
            _refuse(stage_index, output, None)
        return tensors, structure

    return flatten


def rebuild_args(stage_index: int) -> Callable[[tuple[torch.Tensor, ...], bytes], tuple[Any, ...]]:
    """What the runtime calls for the inputs of this stage that came with a structure; returns its positional inputs."""

    def rebuild(tensors: tuple[torch.Tensor, ...], structure: bytes) -> tuple[Any, ...]:
        try:
            return _put_together(tensors, structure)
        except Exception as error:  # whatever an object's own __setstate__ raises, or a class that is not here
            raise StageOutputError(
                f"what stage {stage_index} receives cannot be rebuilt on this rank: {type(error).__name__}: {error}",
                stage=stage_index,
            ) from error

    return rebuild


def tensors_and_structure(output: Any, stage_index: int) -> tuple[list[torch.Tensor], bytes]:
    """An output as the runtime hands it over; the structure is empty for a plain tuple of tensors."""
    tensors, structure = flatten_output(stage_index)(output)
    return list(tensors), structure


def without_graph(output: Any) -> Any:
    """A copy of an object in which every tensor is detached; the object itself where it cannot be copied."""
    try:
        tensors, structure = _take_apart(output)
        return _put_together(tuple(tensor.detach() for tensor in tensors), structure)
    except Exception:  # whatever an object's own __reduce__ or __setstate__ raises
        return output


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _refuse(stage_index: int, output: Any, error: Exception | None) -> NoReturn:
    found = _first_offender(output, "the output")
    if found is not None:
        where, why = found
    elif error is not None:
        where, why = f"the output, a {type(output).__name__},", f"cannot be pickled: {type(error).__name__}: {error}"
    else:
        where, why = "the output", f"is {_kind(output)}, in which there is no tensor: return one"
    raise StageOutputError(f"{where} of stage {stage_index} {why}", stage=stage_index) from error


def _first_offender(value: Any, path: str) -> tuple[str, str] | None:
    """The path to the first thing in an output that cannot travel, and why; None where nothing is found."""
    if isinstance(value, torch.Tensor):
        return None if _can_travel(value) else (path, f"is {_kind(value)}, which cannot be sent as it is{_mend(value)}")
    for name, item in _items(value):
        if (found := _first_offender(item, path + name)) is not None:
            return found
    if _items(value):
        return None
    try:
        pickle.dumps(value)
    except Exception as error:  # as above
        return path, f"is {_kind(value)}, which cannot be sent to another rank: {error}"
    return None


def _can_travel(tensor: torch.Tensor) -> bool:
    """Whether a tensor travels: as its own bytes, or as its local part or its value, which the exchange puts there."""
    if is_dtensor(tensor):
        return _C.can_travel(local_part(tensor))
    return _C.can_travel(waited_for(tensor))


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [(f"[{place}]", item) for place, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    return []


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    layout = "" if value.layout is torch.strided else f" of layout {value.layout}"
    return f"a {type(value).__name__}{layout} on {value.device}"


def _mend(tensor: torch.Tensor) -> str:
    if tensor.layout is not torch.strided:
        return ": return its to_dense(), or its parts"
    return ""


def _normalize_model_output_as_tuple(output: Any) -> tuple[Any, ...]:
    """A stage's output as the next one's positional inputs: ``x`` is ``(x,)``; a list and a named tuple are tuples."""
    return tuple(output) if type(output) is list or isinstance(output, tuple) else (output,)
