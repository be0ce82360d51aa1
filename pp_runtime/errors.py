"""Every error that a user of pp_runtime can meet."""

from __future__ import annotations


class PipelineError(RuntimeError):
    """A step failed, here or on another rank.

    The message names what is known: the rank that failed first, its stage, microbatch and action, the reason,
    what this rank was waiting for, and the traceback of the other rank. The same facts stand as attributes,
    ``None`` where they do not apply.
    """

    def __init__(
        self,
        reason: str,
        *,
        rank: int | None = None,
        stage: int | None = None,
        microbatch: int | None = None,
        action: str | None = None,
        waiting_for: str | None = None,
        remote_traceback: str | None = None,
    ) -> None:
        self.reason = reason
        self.rank = rank
        self.stage = stage
        self.microbatch = microbatch
        self.action = action
        self.waiting_for = waiting_for
        self.remote_traceback = remote_traceback
        super().__init__(self._message())

    def _message(self) -> str:
        facts = (("rank", self.rank), ("stage", self.stage), ("microbatch", self.microbatch), ("action", self.action))
        place = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
        message = f"{place}: {self.reason}" if place else self.reason
        if self.waiting_for is not None:
            message += f" (this rank was waiting for {self.waiting_for})"
        if self.remote_traceback is not None:
            message += f"\n\nTraceback of rank {self.rank}:\n{self.remote_traceback}"
        return message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_pipeline_error, (type(self), self.reason, dict(self.__dict__))


def _rebuild_pipeline_error(kind: type[PipelineError], reason: str, attributes: dict[str, object]) -> PipelineError:
    """Unpickle an error that travelled between processes, attributes included."""
    error = kind.__new__(kind, reason)
    error.__dict__.update(attributes)
    RuntimeError.__init__(error, error._message())
    return error


class PipeliningMetadataError(RuntimeError):
    """What a stage takes or gives is not as it must be."""


class StageOutputError(PipelineError, PipeliningMetadataError):
    """A stage's output cannot be sent to the next stage; the message names what in it, and why."""


class StageInputError(PipelineError):
    """What a stage receives cannot be made a tensor on its rank; the message says why and what to give."""


class PipelineUsageError(ValueError):
    """A call that cannot be right, found before anything ran; the message says what to change."""


class PipelineTypeError(PipelineUsageError, TypeError):
    """An argument has the wrong type."""


class PipelineNameError(PipelineUsageError, AttributeError):
    """A name of torch's that has no counterpart here; the message says what stands in its place."""


class InvalidOrderError(ValueError, AssertionError):
    """An order of actions that is incomplete, out of order or deadlocks; the message names rank and action.

    Programs catch an AssertionError here, which torch raises.
    """


class ActionTextError(ValueError, RuntimeError):
    """A text that is no action. Programs catch a RuntimeError here, which torch raises."""


class OrderFileError(InvalidOrderError):
    """A file of actions that cannot be read; the message names row, column and action."""


class PipelineModeError(PipelineUsageError, RuntimeError):
    """A call that is right in itself, at the wrong time or in the wrong mode."""
