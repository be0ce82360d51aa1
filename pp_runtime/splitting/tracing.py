"""Splitting a model by tracing: torch.export captures it, its graph is cut into stages here.

Importing torch.distributed.pipelining takes a while, so everything of it is fetched when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from pp_runtime.errors import PipelineUsageError
from pp_runtime.splitting.torch_package import torch_pipelining

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.pipelining import Pipe, SplitPoint, pipe_split

__all__ = ["Pipe", "SplitPoint", "annotate_split_points", "pipe_split", "pipeline"]


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
    where the model itself calls ``pipe_split``. Inputs of a step are bound by the names of the model's ``forward``.
    Raises RuntimeError if the model cannot be captured as one graph, PipelineUsageError where a split would give other
    numbers than the model.
    """
    if split_spec is not None and split_policy is not None:
        raise PipelineUsageError("split_spec and split_policy exclude each other: give only one of them")
    with _split_points(module, split_spec or {}):
        program = torch_pipelining("_IR").Pipe._trace_with_export(module, tuple(mb_args), mb_kwargs)
    pipe = _split(module, program, split_policy)
    if split_spec and pipe.split_points < len(split_spec):
        raise PipelineUsageError(
            f"split_spec names {len(split_spec)} split points ({', '.join(split_spec)}) but the model ran through "
            f"{pipe.split_points}: name modules that its forward calls"
        )
    return pipe


def annotate_split_points(mod: torch.nn.Module, spec: dict[str, SplitPoint]) -> None:
    """Let modules of a model call ``pipe_split`` before or after their forward, from now on."""
    for name, point in spec.items():
        target = _submodule(mod, name)
        points = torch_pipelining("_IR").SplitPoint
        if point not in (points.BEGINNING, points.END):
            raise ValueError(f"the split point of {name} is {point!r}: use SplitPoint.BEGINNING or SplitPoint.END")
        target.__dict__["_orig_forward"] = target.forward
        splitting = _splits_before if point is points.BEGINNING else _splits_after
        target.__dict__["forward"] = MethodType(splitting, target)


def _splits_before(self: Any, *args: Any, **kwargs: Any) -> Any:
    torch_pipelining("_IR").pipe_split()
    return self._orig_forward(*args, **kwargs)


def _splits_after(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = self._orig_forward(*args, **kwargs)
    torch_pipelining("_IR").pipe_split()
    return output


@contextmanager
def _split_points(module: torch.nn.Module, spec: Mapping[str, SplitPoint]) -> Iterator[None]:
    """Split points for one trace: the next one of the same model may have others."""
    before = [(target, dict(target.__dict__)) for target in (_submodule(module, name) for name in spec)]
    try:
        annotate_split_points(module, dict(spec))
        yield
    finally:
        for target, attributes in before:
            for name in ("forward", "_orig_forward"):
                target.__dict__.pop(name, None)
                if name in attributes:
                    target.__dict__[name] = attributes[name]


def _submodule(module: torch.nn.Module, name: str) -> torch.nn.Module:
    target = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise AttributeError(f"the model has no module '{name}': '{part}' is missing in {type(target).__name__}")
        target = getattr(target, part)
    return target


def _split(
    module: torch.nn.Module,
    program: torch.export.ExportedProgram,
    split_policy: Callable[[fx.GraphModule], fx.GraphModule] | None,
) -> Any:
    from pp_runtime.splitting.graph_splitting import split_graph
    from pp_runtime.splitting.traced_inputs import ModelInputs

    traced: Any = program.module(check_guards=False)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    inputs = ModelInputs.of(program, module, placeholders)
    if split_policy is not None:
        traced = split_policy(traced)
    constants = [name for name in program.constants if name not in program.state_dict]
    temporary = {*program.graph_signature.non_persistent_buffers, *constants}
    return _pipe_class()(split_graph(traced, module, inputs, temporary, _is_split), inputs)


def _is_split(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (
        torch.ops.pippy._pipe_split.default,
        torch_pipelining("_IR").pipe_split,
    )


def __getattr__(name: str) -> Any:
    if name == "Pipe":
        return _pipe_class()
    if name in ("SplitPoint", "pipe_split"):
        return getattr(torch_pipelining("_IR"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _pipe_class() -> Any:
    from pp_runtime.planning import PipeInfo, run_stages
    from pp_runtime.splitting.graph_splitting import SplitModel, stage_name
    from pp_runtime.splitting.traced_inputs import ModelInputs

    torchs: Any = torch_pipelining("_IR").Pipe

    class Pipe(torchs):  # type: ignore[misc, unused-ignore]
        """A traced and split model. Called, it runs whole on one rank; ``build_stage`` takes one stage out of it.

        Called, it gives the leaves of the model's output as a tuple.
        """

        def __init__(self, split: SplitModel, inputs: ModelInputs) -> None:
            super().__init__(split.graph_module, split.num_stages, False, None)
            self.inputs = inputs
            self.tied = split.tied
            self.split_points = split.split_points
            self.replicated_params = [{stage_name(stage): name for stage, name in places} for places in split.tied]

        @staticmethod
        def from_tracing(
            mod: torch.nn.Module,
            example_args: tuple[Any, ...],
            example_kwargs: dict[str, Any] | None = None,
            split_policy: Callable[[fx.GraphModule], fx.GraphModule] | None = None,
        ) -> Any:
            """Trace a model that calls ``pipe_split`` itself, or whose graph ``split_policy`` splits."""
            return pipeline(mod, example_args, example_kwargs, split_policy=split_policy)

        @staticmethod
        def _from_traced(
            mod: torch.nn.Module,
            exported_program: torch.export.ExportedProgram,
            multi_use_param_spec: Any = None,
            output_loss_value_spec: Any = None,
            split_policy: Callable[[fx.GraphModule], fx.GraphModule] | None = None,
        ) -> Pipe:
            if output_loss_value_spec is not None:
                raise PipelineUsageError("a loss in the traced model is not supported: give the schedule a loss_fn")
            return _split(mod, exported_program, split_policy)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return run_stages(self.split_gm, args, kwargs)

        def info(self) -> PipeInfo:
            """What ``build_stage`` needs to know of the whole, without the stages."""
            return PipeInfo.of(self.split_gm.graph, self.num_stages, self.has_loss_and_backward, self.tied)

        def build_stage(self, stage_index: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Any:
            """The stage of this index, on a device, for schedules of ours. ``group`` is the pipeline's."""
            from pp_runtime.splitting.traced_device import set_device
            from pp_runtime.stage import build_stage

            stage_module = self.get_stage_module(stage_index)
            if isinstance(stage_module, fx.GraphModule):
                # The trace has the device of the example inputs in calls such as torch.zeros(..., device=...).
                set_device(stage_module, torch.device(device))
            return build_stage(stage_module, stage_index, self.info(), device, group)

    Pipe.__module__ = __name__
    Pipe.__qualname__ = "Pipe"
    return Pipe
