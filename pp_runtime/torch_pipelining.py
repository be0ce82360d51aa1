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
from types import ModuleType

_NAME = "torch.distributed.pipelining"
_loading = threading.Lock()


@cache
def torch_pipelining(submodule: str = "") -> ModuleType:
    """A module of torch's package: the package itself, or ``_IR``, ``_utils`` and so on."""
    with _loading:
        return _load(f"{_NAME}.{submodule}" if submodule else _NAME)


def _load(name: str) -> ModuleType:
    present = _present()
    if all(_is_torchs(key, module) for key, module in present.items()):
        return importlib.import_module(name)
    import torch.distributed as parent

    # `import torch.distributed.pipelining as p` reads this attribute before sys.modules.
    attribute = parent.__dict__.get("pipelining")
    try:
        for key in present:
            del sys.modules[key]
        sys.modules.update(_loaded)
        module = importlib.import_module(name)
        _loaded.update(_present())
        return module
    finally:
        for key in _present():
            del sys.modules[key]
        sys.modules.update(present)
        if attribute is not None:
            parent.__dict__["pipelining"] = attribute
        else:
            parent.__dict__.pop("pipelining", None)


# torch's modules that are not in sys.modules, so that a second one is not made beside the first.
_loaded: dict[str, ModuleType] = {}


def _present() -> dict[str, ModuleType]:
    return {key: module for key, module in sys.modules.items() if key == _NAME or key.startswith(f"{_NAME}.")}


def _is_torchs(key: str, module: ModuleType | None) -> bool:
    return getattr(module, "__name__", None) == key
