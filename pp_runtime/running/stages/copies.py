"""Copying and pickling a stage: all of it but its half in C++, which the copy makes anew."""

from __future__ import annotations

import copy
from typing import Any

from pp_runtime.errors import PipelineUsageError

# What a copy makes for itself, or does without.
_OWN = frozenset(
    (
        "_core",
        "_known",
        "_wrapped",
        "_adapter",
        "_meter",
        "_gradients",
        "_exchange",
        "_loss_modules",
        "_tie_owners",
        "_inside_step",
        "fwd_cache",
        "bwd_cache",
        "backward_state",
        "dw_runner",
    )
)


class CopiedStage:
    """A copy has a module of its own, the same process group, and nothing of a step that is under way."""

    group: Any
    stage_index: int

    def __getstate__(self) -> dict[str, Any]:
        if getattr(self, "group", None) is not None:
            raise PipelineUsageError(
                f"stage {getattr(self, 'stage_index', '')} cannot be pickled with its process group, which is of this "
                "process: pickle its submod, or set stage.group = None before and give the stage its group again after"
            )
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.__dict__.pop("_had_core", False):
            self._make_core()

    def __copy__(self) -> CopiedStage:
        made = type(self).__new__(type(self))
        made.__setstate__(self._state())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedStage:
        group = getattr(self, "group", None)
        if group is not None:
            memo[id(group)] = group  # the copy is a member of the same group
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self._state(), memo))
        return made

    def _state(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return state | {"_had_core": "_core" in self.__dict__}

    def _make_core(self) -> None:
        """Make the half in C++, for this stage's module."""
        raise NotImplementedError
