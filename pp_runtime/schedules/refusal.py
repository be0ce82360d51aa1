"""Tells the other ranks of a mistake that this rank alone may have made, so that they raise too and do not wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pp_runtime.stage import _PipelineStageBase


@contextlib.contextmanager
def refusal_told_to_other_ranks(stage: _PipelineStageBase) -> Iterator[None]:
    """Around the making of a schedule: a rank whose schedule cannot be made never comes to the first step."""
    try:
        yield
    except ValueError as error:
        if stage.group_size > 1:
            # What was wrong is what the user must see, also if the others cannot be told.
            with contextlib.suppress(Exception):
                _publish(stage, error)
        raise


def _publish(stage: _PipelineStageBase, error: Exception) -> None:
    from pp_runtime.agreement import Agreement
    from pp_runtime.deadline import default_deadline
    from pp_runtime.failures import FailureRecord

    # The schedules of a group are numbered alike on every rank, so this takes the number of the one that failed.
    agreement = Agreement(stage.group, default_deadline())
    agreement.watch.publish(FailureRecord.of(error, stage.group_rank).to_text())
