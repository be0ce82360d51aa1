"""The API under test: pp_runtime's, or torch's own where PP_TEST_API=torch (to try the tests themselves)."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

IS_TORCH = os.environ.get("PP_TEST_API") == "torch"
PACKAGE = "torch.distributed.pipelining" if IS_TORCH else "pp_runtime"

_SUBMODULES = ("schedules", "stage", "microbatch", "errors")


def __getattr__(name: str) -> Any:
    """``api.PipelineStage``, ``api.schedules._Action``: imported at first use, so that collection needs no package."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{PACKAGE}.{name}")
    return getattr(importlib.import_module(PACKAGE), name)


def ours_only(reason: str) -> pytest.MarkDecorator:
    """Mark a test of something that torch lacks or gets wrong."""
    import pytest  # a bare GPU machine has none, and needs no marks

    return pytest.mark.skipif(IS_TORCH, reason=f"torch: {reason}")
