"""Tells the other ranks what this one could not make or begin, so that they raise in their first step and never wait.

A refusal is an attempt to run a schedule that failed (agreement.py): every other rank's next first step raises it,
once, and the attempts after it are as if it had not been. A rank that is refused twice has failed twice.

A constructor talks to no other rank unless it fails. A program that an exception ends tells it too, whatever raised it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from pp_runtime.running.agreement.agreement import Agreement
from pp_runtime.running.agreement.deadline import DEFAULT_DEADLINE
from pp_runtime.running.agreement.failures import FailureRecord
from pp_runtime.running.agreement.groups import group_or_world, groups_of_stages, is_dry_run

# Set on an error once the others know of it: one error is one refusal, however many constructors it passes through.
_TOLD = "_pp_runtime_told"
_SECONDS_AT_EXIT = 2.0


def refuse(group: dist.ProcessGroup | None, error: BaseException, stage: Any = None) -> None:
    """Tell the group's ranks of an error on this one. Raises nothing: what was wrong is what the user must see."""
    if not getattr(error, _TOLD, False):
        _refuse_everywhere([group], error, stage)


def _refuse_everywhere(groups: Sequence[dist.ProcessGroup | None], error: BaseException, stage: Any = None) -> None:
    with contextlib.suppress(Exception):
        setattr(error, _TOLD, True)
    for group in groups:
        with contextlib.suppress(Exception):
            _publish(group, error, stage)


def _publish(group: dist.ProcessGroup | None, error: BaseException, stage: Any) -> None:
    if dist.is_initialized():
        group = group_or_world(group)
        rank = dist.get_rank(group)
        if rank < 0 or dist.get_world_size(group) == 1 or is_dry_run(group):
            return
        record = FailureRecord.of(error, rank, stage=stage if isinstance(stage, int) else None)
        Agreement(group, DEFAULT_DEADLINE).watch.publish(record.to_text())


def refuse_for(stage: Any, error: BaseException) -> None:
    """Tell the ranks of a stage's group; a stage that only plans, made without its base's constructor, has none."""
    if hasattr(stage, "group") and hasattr(stage, "stage_index"):
        refuse(stage.group, error, stage.stage_index)


@contextlib.contextmanager
def refusals_of(stage: Any) -> Iterator[None]:
    """Around a part of a schedule's making that is no constructor."""
    try:
        yield
    except Exception as error:
        refuse_for(stage, error)
        raise


class TellsRefusals:
    """A base of stages and schedules: their constructors, and users' subclasses', tell the other ranks of an error."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _told(cls.__init__)  # type: ignore[method-assign]


def _told(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def told_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except BaseException as error:
            outermost = type(self).__init__ is told_init
            with contextlib.suppress(Exception):
                _tell(self, _arguments_of(init, self, args, kwargs), error, outermost=outermost)
            raise

    return told_init


def _arguments_of(init: Callable[..., None], self: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """By their names, as far as those are known."""
    try:
        bound = inspect.signature(init).bind(self, *args, **kwargs)
    except TypeError:  # arguments that do not fit
        return {**kwargs, "": args}
    bound.apply_defaults()
    named = {name: value for name, value in bound.arguments.items() if value is not self}
    return {**named, **kwargs}


def _tell(made: Any, arguments: dict[str, Any], error: BaseException, *, outermost: bool) -> None:
    stage = next((value for value in _flat(arguments.values()) if hasattr(value, "group_rank")), None)
    index = arguments.get("stage_index", getattr(made, "stage_index", None))
    if stage is not None:
        refuse_for(stage, error)
    elif "group" in arguments:
        if arguments["group"] is None or isinstance(arguments["group"], dist.ProcessGroup):
            refuse(arguments["group"], error, index)
    elif hasattr(made, "group"):
        refuse(made.group, error, index)
    elif outermost:
        _refuse_everywhere(groups_of_stages() or [None], error)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


@atexit.register
def _tell_at_exit() -> None:
    """The other ranks of a program that an exception ends would wait for it, if it had not come to its first step."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None or getattr(error, _TOLD, False) or hasattr(sys, "ps1") or not dist.is_initialized():
        return
    # A store whose keeper is gone may be tried for minutes.
    with contextlib.suppress(RuntimeError):
        groups = groups_of_stages() or list(dist.distributed_c10d._world.pg_map)
        teller = threading.Thread(target=_refuse_everywhere, args=(groups, error), daemon=True)
        teller.start()
        teller.join(_SECONDS_AT_EXIT)
