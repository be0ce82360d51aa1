"""Imports of modules of ``torch.distributed.pipelining`` where a program has put this package in its place.

sys.modules["torch.distributed.pipelining"] = pp_runtime
from torch.distributed.pipelining.schedules import Schedule1F1B     # pp_runtime.schedules, not a second copy of it
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_TORCHS = "torch.distributed.pipelining"
_OURS = __package__ or "pp_runtime"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the module of ours for torch's name of it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if not fullname.startswith(f"{_TORCHS}.") or sys.modules.get(_TORCHS) is not sys.modules.get(_OURS):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        ours = importlib.import_module(_OURS + spec.name.removeprefix(_TORCHS))
        self._spec = ours.__spec__
        return ours

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import has just put torch's name there


def stand_in_torchs_place() -> None:
    """Have torch's names of modules mean ours from the moment that a program swaps the package."""
    if not any(type(finder).__qualname__ == _Finder.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
