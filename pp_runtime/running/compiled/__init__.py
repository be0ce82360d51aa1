"""Compiled regions: a backend for torch.compile whose backwards are cut into dI and dW where a schedule splits them."""

from __future__ import annotations

from pp_runtime.running.compiled.backend import compile_backend, compile_module

__all__ = ["compile_backend", "compile_module"]
