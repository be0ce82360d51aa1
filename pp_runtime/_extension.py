"""Says what to do where the C++ extension is missing or was built for another torch."""

from __future__ import annotations

import importlib.util

import torch

_BUILD = "run 'make build' in its folder, or 'pip install --no-build-isolation -e .' there"


def check_extension() -> None:
    """Raise ImportError unless pp_runtime._C was built, and for the torch that is installed."""
    if importlib.util.find_spec("pp_runtime._C") is None:
        raise ImportError(f"pp_runtime's C++ extension has not been built: {_BUILD}")
    try:
        from pp_runtime._build_info import TORCH_VERSION
    except ImportError:
        raise ImportError(f"pp_runtime's C++ extension does not say which torch it was built for: {_BUILD}") from None
    if torch.__version__ != TORCH_VERSION:
        raise ImportError(
            f"pp_runtime's C++ extension was built for torch {TORCH_VERSION}, "
            f"but torch {torch.__version__} is installed: {_BUILD} again"
        )
