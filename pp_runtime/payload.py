"""What a stage's output may be, and how it is told when it cannot travel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .errors import StageOutputError


def refuse_output(stage_index: int) -> Callable[[Any], NoReturn]:
    """What the runtime calls for an output of this stage that is neither a tensor nor a tuple or list of tensors."""

    def refuse(output: Any) -> NoReturn:
        raise StageOutputError(
            f"{_first_offender(output)}; a stage hands tensors to the next one: return a tensor or a tuple of tensors",
            stage=stage_index,
        )

    return refuse


def refuse_structure(_args: tuple, _structure: bytes) -> NoReturn:
    """Messages carry plain tuples of tensors, so there is nothing to rebuild."""
    raise StageOutputError("a message came with a structure, which this version does not send")


def _first_offender(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        for position, item in enumerate(output):
            if not isinstance(item, torch.Tensor):
                return f"output {position} of the stage is {_kind(item)}, not a tensor"
    return f"the stage returned {_kind(output)}"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _normalize_model_output_as_tuple(output: Any) -> tuple[Any, ...]:
    """A stage's output as a tuple of its items: ``x`` is ``(x,)``, and a list is the tuple of it."""
    if isinstance(output, list):
        return tuple(output)
    return output if isinstance(output, tuple) else (output,)
