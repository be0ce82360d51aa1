"""A batch on its way into a schedule and out of it: split, checked, merged."""

from __future__ import annotations

from typing import Any

from pp_runtime.errors import PipelineTypeError, PipelineUsageError
from pp_runtime.microbatch import merge_chunks, split_batch, split_target
from pp_runtime.schedules.fields import ScheduleFields


class BatchHandling(ScheduleFields):
    """The part of a schedule that turns whole batches into microbatches and back."""

    def _split_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> tuple[list, list]:
        count = self._n_microbatches
        holds_first = any(stage.is_first for stage in self._stages)
        if not holds_first:
            args = ()  # as in torch, positional inputs count only where the first stage is
        if not args and not kwargs:
            return [()] * count, [{}] * count
        return split_batch(
            tuple(args),
            kwargs or {},
            count,
            self._args_chunk_spec if args else None,
            self._kwargs_chunk_spec if kwargs else None,
            batch_is_elsewhere=not holds_first,
        )

    def _split_target(self, target: Any) -> list | None:
        if target is None or self._last_stage() is None:
            return None
        return split_target(target, self._n_microbatches, self._target_chunk_spec)

    def _check_inputs(
        self,
        arg_mbs: list | None = None,
        kwarg_mbs: list | None = None,
        target_mbs: list | None = None,
        losses: list | None = None,
    ) -> tuple[list, list]:
        """The microbatches, empty ones where none were given; an error if they have the wrong type or count."""
        count = self._n_microbatches
        check_microbatches("arg_mbs", arg_mbs, count, tuple)
        check_microbatches("kwarg_mbs", kwarg_mbs, count, dict)
        check_microbatches("target_mbs", target_mbs, count, object)
        if losses is not None and not isinstance(losses, list):
            raise PipelineTypeError(f"losses must be a list, which step() fills, got {type(losses).__name__}")
        return [()] * count if arg_mbs is None else arg_mbs, [{}] * count if kwarg_mbs is None else kwarg_mbs

    def _merge_outputs(self, output_chunks: list[Any]) -> Any:
        return merge_chunks(output_chunks, self._output_merge_spec)


def check_microbatches(name: str, microbatches: Any, count: int, kind: type) -> None:
    """An error unless ``microbatches`` is None or a list of ``count`` entries of a type."""
    if microbatches is None:
        return
    if not isinstance(microbatches, list):
        raise PipelineTypeError(f"{name} must be a list with an entry for each microbatch, got {microbatches!r}")
    if len(microbatches) != count:
        raise PipelineUsageError(f"{name} must have {count} entries, one for each microbatch, got {len(microbatches)}")
    for index, entry in enumerate(microbatches):
        if not isinstance(entry, kind):
            raise PipelineTypeError(f"{name}[{index}] must be a {kind.__name__}, got {type(entry).__name__}")
