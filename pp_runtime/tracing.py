"""Splitting a model by tracing: torch's own tracer, whose ``Pipe`` builds stages of ours.

Importing torch.distributed.pipelining takes a while, so everything of it is fetched when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.pipelining import Pipe, SplitPoint, pipe_split

__all__ = ["Pipe", "SplitPoint", "pipe_split", "pipeline"]


def pipeline(
    module: torch.nn.Module,
    mb_args: tuple[Any, ...],
    mb_kwargs: dict[str, Any] | None = None,
    split_spec: dict[str, SplitPoint] | None = None,
    split_policy: Callable[[fx.GraphModule], fx.GraphModule] | None = None,
) -> Pipe:
    """Trace a model and split it into stages.

    ``mb_args`` and ``mb_kwargs`` are example inputs of one microbatch. The stages begin and end where ``split_spec``
    says (``{"layers.4": SplitPoint.BEGINNING}``), or where ``split_policy`` puts ``pipe_split`` calls in the graph, or
    where the model itself calls ``pipe_split``. Raises RuntimeError if the model cannot be captured as one graph.
    """
    from torch.distributed import pipelining

    return _ours(pipelining.pipeline(module, mb_args, mb_kwargs, split_spec, split_policy))


def __getattr__(name: str) -> Any:
    if name == "Pipe":
        return _pipe_class()
    if name in ("SplitPoint", "pipe_split"):
        from torch.distributed import pipelining

        return getattr(pipelining, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _pipe_class() -> Any:
    from torch.distributed.pipelining import Pipe as TorchPipe
    from torch.distributed.pipelining._IR import _modify_graph_op_device

    class Pipe(TorchPipe):  # type: ignore[misc, unused-ignore]
        """A traced and split model. Called, it runs whole on one rank; ``build_stage`` takes one stage out of it."""

        @staticmethod
        def from_tracing(*args: Any, **kwargs: Any) -> Pipe:
            return _ours(TorchPipe.from_tracing(*args, **kwargs))

        def build_stage(self, stage_index: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Any:
            """The stage of this index, on a device, for schedules of ours. ``group`` is the pipeline's."""
            from pp_runtime.stage import build_stage

            stage_module = self.get_stage_module(stage_index)
            if isinstance(stage_module, fx.GraphModule):
                # The trace has the device of the example inputs in calls such as torch.zeros(..., device=...).
                _modify_graph_op_device(stage_module, torch.device(device))
            return build_stage(stage_module, stage_index, self.info(), device, group)

    Pipe.__module__ = __name__
    Pipe.__qualname__ = "Pipe"
    return Pipe


def _ours(pipe: Any) -> Any:
    """The same pipe, as our class: torch's tracer makes its own."""
    pipe.__class__ = _pipe_class()
    return pipe
