"""How long a rank waits for another before it gives up and names it."""

from __future__ import annotations

import os

from pp_runtime.errors import PipelineUsageError

DEFAULT_DEADLINE = 1800.0  # seconds


def default_deadline() -> float:
    """What the environment variable PP_RUNTIME_DEADLINE asks for, in seconds."""
    text = os.environ.get("PP_RUNTIME_DEADLINE")
    if text is None:
        return DEFAULT_DEADLINE
    try:
        return checked_deadline(float(text), "PP_RUNTIME_DEADLINE")
    except ValueError:
        raise PipelineUsageError(f"PP_RUNTIME_DEADLINE is {text!r}: give it a number of seconds above 0") from None


def checked_deadline(seconds: float, name: str) -> float:
    """The deadline, if it is one."""
    if not seconds > 0:
        raise PipelineUsageError(f"{name} is {seconds}: give it a number of seconds above 0")
    return float(seconds)
