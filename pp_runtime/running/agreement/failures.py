"""A failure as it travels between ranks: what the first rank to fail publishes, and the error that the others raise."""

from __future__ import annotations

import json
import traceback
from dataclasses import asdict, dataclass

from pp_runtime.errors import PipelineError

_LONGEST_TRACEBACK = 8000


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """Where and why a rank failed. ``action`` is the text of the action it was in, None outside a step.

    ``kind`` is the error's class; empty where others tell it of a rank that cannot. ``absent`` says that the rank
    did not come to its first step.
    """

    rank: int
    kind: str
    reason: str
    traceback: str
    stage: int | None = None
    microbatch: int | None = None
    action: str | None = None
    absent: bool = False

    @staticmethod
    def of(
        error: BaseException,
        rank: int,
        *,
        stage: int | None = None,
        microbatch: int | None = None,
        action: str | None = None,
    ) -> FailureRecord:
        """The record of an error on this rank."""
        text = "".join(traceback.format_exception(error))
        return FailureRecord(
            rank, type(error).__name__, str(error), text[-_LONGEST_TRACEBACK:], stage, microbatch, action
        )

    def to_text(self) -> str:
        """As it is published."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> FailureRecord:
        """From what was published; a text that is no record (the store itself failed) becomes the reason."""
        try:
            return FailureRecord(**json.loads(text))
        except (ValueError, TypeError):
            return FailureRecord(-1, "StoreError", text, "")

    def error(self, waiting_for: str | None = None) -> PipelineError:
        """The error that another rank raises for it."""
        return PipelineError(
            f"{self.kind}: {self.reason}" if self.kind else self.reason,
            rank=self.rank if self.rank >= 0 else None,
            stage=self.stage,
            microbatch=self.microbatch,
            action=self.action,
            waiting_for=waiting_for,
            remote_traceback=self.traceback or None,
        )
