"""torch's own ``torch.distributed.pipelining``, also where a program has put this package in its place.

    sys.modules["torch.distributed.pipelining"] = pp_runtime

makes every later import of that name ours, those of this package included. The tracer needs torch's, so it is imported
with such entries out of the way, which are back in their places when this returns.
"""

from __future__ import annotations

import importlib
import sys
import threading
from functools import cache
from pathlib import Path
from types import ModuleType

import torch.distributed as parent

_NAME = "torch.distributed.pipelining"
_FOLDER = Path(parent.__file__).parent / "pipelining"
_loading = threading.Lock()
# torch's modules that were imported here while others had their names: a second import must not make second ones.
_hidden: dict[str, ModuleType] = {}


@cache
def torch_pipelining(submodule: str = "") -> ModuleType:
    """A module of torch's package: the package itself, or ``_IR``, ``_utils`` and so on."""
    name = f"{_NAME}.{submodule}" if submodule else _NAME
    with _loading:
        others = {key: module for key, module in _entries().items() if not _is_torchs(module)}
        return _import_beside(name, others) if others else importlib.import_module(name)


def _import_beside(name: str, others: dict[str, ModuleType]) -> ModuleType:
    """Import a module of torch's while other modules have the names of some."""
    # `import torch.distributed.pipelining as p` reads this attribute, not sys.modules, so it is put back too.
    attribute = parent.__dict__.get("pipelining")
    before = _entries()
    for key in others:
        del sys.modules[key]
    sys.modules.update(_known(attribute) | _hidden)
    try:
        return importlib.import_module(name)
    finally:
        _hidden.update({key: module for key, module in _entries().items() if key not in before or key in others})
        for key in _entries():
            del sys.modules[key]
        sys.modules.update(before)
        parent.__dict__.pop("pipelining", None)
        if attribute is not None:
            parent.__dict__["pipelining"] = attribute


def _known(package: ModuleType | None) -> dict[str, ModuleType]:
    """torch's package, where the program imported it before others took its names, and what it has of modules."""
    if package is None or not _is_torchs(package):
        return {}
    parts = {f"{_NAME}.{name}": part for name, part in vars(package).items() if isinstance(part, ModuleType)}
    return {_NAME: package} | {key: part for key, part in parts.items() if _is_torchs(part)}


def _entries() -> dict[str, ModuleType]:
    return {key: module for key, module in list(sys.modules.items()) if key == _NAME or key.startswith(f"{_NAME}.")}


def _is_torchs(module: ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == _FOLDER
