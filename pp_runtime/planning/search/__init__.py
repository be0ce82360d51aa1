"""The shortest order under given costs and memory, and which schedule would win."""

from __future__ import annotations

from pp_runtime.planning.search.comparison import aligned, compare
from pp_runtime.planning.search.shortest_order import auto

__all__ = [
    "aligned",
    "auto",
    "compare",
]
