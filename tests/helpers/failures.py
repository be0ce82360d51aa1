"""What a rank meets where a step is meant to fail: the error, its text, its cause and how long it took to come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PROMPT = 12.0  # seconds; a process group's own time-out in these tests is 60


@dataclass(frozen=True)
class Met:
    """An error as it can travel to the test's process."""

    kinds: tuple[str, ...]  # its class and those above it
    text: str
    seconds: float
    cause: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # rank, stage, microbatch, ... of a PipelineError

    def is_a(self, kind: str) -> bool:
        return kind in self.kinds


def meet(call: Callable[[], Any]) -> Met | None:
    """Call, and describe the exception that comes; None where none does."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return Met(
            tuple(kind.__name__ for kind in type(error).__mro__),
            str(error),
            time.monotonic() - start,
            type(error.__cause__).__name__ if error.__cause__ else None,
            {name: getattr(error, name, None) for name in ("rank", "stage", "microbatch", "action", "waiting_for")},
        )
    return None
