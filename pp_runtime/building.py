"""From a whole model to a pipeline in one call: stages, placement, schedule, and what a training loop needs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import ORDERS, schedule_name
from pp_runtime.running import (
    clip_grad_norm_,
    find_parameter,
    load_optimizer_state,
    optimizer_state,
    ties_of,
    unwrapped_name,
)
from pp_runtime.schedules import PipelineScheduleMulti, get_schedule_class
from pp_runtime.splitting import Partition, find_layers, layer_stages, model_costs, partition, stages_of_rank
from pp_runtime.stage import PipelineStage

_OF_ALL = ("return_outputs",)
_OF_LAST = ("target", "target_mbs", "losses", "loss_kwargs")
"""Which keywords of a step are for every rank, and for the last stage's; the others go in with the model's inputs."""


class BuiltPipeline:
    """A rank's part of a pipeline: its stages under their schedule. Made by :func:`build_pipeline`.

    ``stages`` and ``schedule`` are what a program could have made itself, and may be used as such.
    """

    def __init__(self, stages: list[PipelineStage], schedule: Any, partition: Partition, name: str) -> None:
        self.stages = stages
        self.schedule = schedule
        self.partition = partition
        self._name = name

    @property
    def modules(self) -> list[nn.Module]:
        """The modules of this rank's stages."""
        return [stage.submod for stage in self.stages]

    @property
    def holds_first(self) -> bool:
        """Whether the model's inputs go in on this rank."""
        return any(stage.is_first for stage in self.stages)

    @property
    def holds_last(self) -> bool:
        """Whether outputs and losses come out on this rank."""
        return any(stage.is_last for stage in self.stages)

    def step(self, *args: Any, **named: Any) -> Any:
        """One batch forward and backward. Every rank may give everything; each stage takes what is its own.

        ``args`` and the model's keywords go in on the rank of the first stage, ``target`` on that of the last, and all
        else is as in the schedule's ``step``: ``losses``, ``return_outputs``, ``loss_kwargs``, the parts already cut.
        Returns the batch's output on the rank of the last stage, None elsewhere; ``losses`` is filled there.
        """
        return self._run(self.schedule.step, args, named)

    def eval(self, *args: Any, **named: Any) -> Any:
        """One batch forward. As ``step``; a target may be left out."""
        return self._run(self.schedule.eval, args, named)

    def _run(self, run: Callable[..., Any], args: Any, named: Mapping[str, Any]) -> Any:
        taken = {
            name: value
            for name, value in named.items()
            if name in _OF_ALL or (self.holds_last if name in _OF_LAST else self.holds_first)
        }
        return run(*(args if self.holds_first else ()), **taken)

    def train(self, mode: bool = True) -> None:
        """Put the stages' modules into training mode, or out of it."""
        for module in self.modules:
            module.train(mode)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the unsplit model's names; one that stages share comes once."""
        seen = set[nn.Parameter]()
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield unwrapped_name(module, name), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """For an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def clip_grad_norm_(self, max_norm: float, **options: Any) -> Tensor:
        """Clip by the norm of all stages' gradients: :func:`pp_runtime.clip_grad_norm_`."""
        return clip_grad_norm_(self.stages, max_norm, **options)

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the unsplit model's state, under its names. All ranks' parts together are all of it."""
        return {name: value for state in self._states() for name, (_, value) in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load this rank's part out of the unsplit model's state, or of any part that holds it.

        Raises PipelineUsageError, before anything is loaded, for a state that lacks a name of this rank's.
        """
        states = self._states()
        missing = sorted(name for state in states for name in state if name not in state_dict)
        if missing:
            raise PipelineUsageError(
                f"the state lacks {len(missing)} names of stages {[stage.stage_index for stage in self.stages]}, "
                f"{missing[0]} the first: it must hold the layers of this rank"
            )
        for module, state in zip(self.modules, states, strict=True):
            module.load_state_dict({own: state_dict[name] for name, (own, _) in state.items()})

    def _states(self) -> list[dict[str, tuple[str, Any]]]:
        """Each module's state by the unsplit model's names, with the names that the module has by now."""
        return [
            {unwrapped_name(module, own): (own, value) for own, value in module.state_dict().items()}
            for module in self.modules
        ]

    def optim_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of an optimizer of this rank's parameters, under the unsplit model's names, flat.

        All ranks' parts together are that of the unsplit model's optimizer: ``state.NAME.exp_avg``,
        ``param_groups.NAME.lr``, ``has_state.NAME``, and ``optimizer``, its class. A parameter that stages share has
        one name on all of them. The tensors are the optimizer's own. Raises PipelineUsageError for an optimizer that
        holds other parameters than this pipeline's, and for states that are not tensors, numbers and dicts of them.
        """
        return optimizer_state(optimizer, self._optimized_names())

    def load_optim_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Load this rank's part out of optimizer states, whatever ranks and schedule wrote them.

        The options of groups are loaded, too, such as the learning rate; which parameters are in one group is as the
        program made it. Raises PipelineUsageError, before anything is changed, for a state that lacks a parameter, that
        is of another class of optimizer or other options, and for parameters of one group that had other options.
        """
        load_optimizer_state(optimizer, self._optimized_names(), state_dict)

    def stateful(self, optimizer: torch.optim.Optimizer) -> OptimizerStateful:
        """The optimizer as ``torch.distributed.checkpoint`` takes it.

            dcp.save({"model": pipeline, "optimizer": pipeline.stateful(optimizer)}, checkpoint_id=folder)

        ``dcp.load`` of the same puts it into an optimizer on other ranks under another schedule. It writes into what
        the optimizer has, so a load that fails may leave it changed.
        """
        return OptimizerStateful(self, optimizer)

    def _optimized_names(self) -> dict[nn.Parameter, str]:
        names = {
            find_parameter(stage, name): label
            for stage in self.stages
            for label, own in ties_of(stage).items()
            for name in own
        }
        return {parameter: names.get(parameter, name) for name, parameter in self.named_parameters()}

    def report(self) -> str:
        """What was built: the schedule, the layers of each stage, how even they are, and the bubble that remains."""
        ranks = dist.get_world_size(self.stages[0].group)
        lines = [
            f"{self._name}, {ranks} ranks, {len(self.partition)} stages, {self.schedule._n_microbatches} microbatches"
        ]
        held = {stage.stage_index for stage in self.stages}
        for index, (layers, load) in enumerate(zip(self.partition.ranges, self.partition.loads, strict=True)):
            what = f"layers {layers.start} to {layers.stop - 1}" if len(layers) else "no layers"
            lines.append(f"  stage {index}: {what}, load {load:.3g}" + (", on this rank" if index in held else ""))
        lines.append(f"balance {self.partition.balance:.3f}" + self._bubble(ranks))
        return "\n".join(lines)

    def _bubble(self, ranks: int) -> str:
        if self._name not in ORDERS:  # Auto, whose order is searched for
            return ""
        bubble = self.partition.simulate(self._name, ranks, self.schedule._n_microbatches).bubble
        return f", bubble {bubble:.3f} if F, I and W take as long"


@dataclass(frozen=True, slots=True)
class OptimizerStateful:
    """The state of an optimizer, as ``torch.distributed.checkpoint`` saves and loads it. Made by a BuiltPipeline."""

    pipeline: BuiltPipeline
    optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`BuiltPipeline.optim_state_dict`."""
        return self.pipeline.optim_state_dict(self.optimizer)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As :meth:`BuiltPipeline.load_optim_state_dict`."""
        self.pipeline.load_optim_state_dict(self.optimizer, state_dict)


def build_pipeline(
    model: nn.Module | Callable[[], nn.Module],
    schedule: str = "1F1B",
    *,
    microbatches: int,
    loss_fn: Callable[..., Tensor] | None = None,
    example: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    group: Any = None,
    axis: str = "pp",
    num_stages: int | None = None,
    partition: str | Sequence[int] = "layers",
    layers: str | None = None,
    weights: Any = None,
    parallelize: Callable[[nn.Module], nn.Module | None] | None = None,
    compile: bool | Mapping[str, Any] = False,
    **options: Any,
) -> BuiltPipeline:
    """Cut a whole model, place its stages and put them under a schedule. Called by every rank of the pipeline.

    Args:
        model: whose layers stand in a list or dict (:func:`pp_runtime.layer_stages`), the same on every rank; or a
            function that makes it.
        schedule: its name.
        example, example_kwargs: inputs of the model, of any batch size.
        group: the pipeline's process group, or a device mesh, whose ``axis`` it is if it has more than one.
        num_stages: in all; by default as many a rank as the schedule takes, two where it takes any.
        partition: "layers", equally many; what layers, and what comes before and after them, cost: "parameters",
            "flops", "memory" of a forward and backward of the example, or "time", of forwards of it, measured on the
            first rank; or the sizes themselves, as :func:`pp_runtime.partition` gives them.
        layers, weights, parallelize: as in :func:`pp_runtime.layer_stages`. With ``weights``, the model may be on the
            meta device (:func:`pp_runtime.without_weights`): each rank then reads its own stages' and makes no others.
        compile: compile each stage for split backwards (``PipelineStage.compile``); a mapping has its options.
        options: of the schedule's class.

    Raises PipelineUsageError for a model, a mesh or a count that cannot be used.
    """
    process_group = _group_of(group, axis)
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    whole = model if isinstance(model, nn.Module) else model()
    kind = get_schedule_class(schedule)
    mine = stages_of_rank(schedule, rank, ranks, num_stages)
    count = ranks * len(mine)
    cut = _cut(whole, count, partition, example, example_kwargs or {}, layers, process_group)
    stages = layer_stages(
        whole,
        cut,
        mine,
        device,
        example,
        example_kwargs,
        layers=layers,
        group=process_group,
        weights=weights,
        parallelize=parallelize,
    )
    if compile:
        for stage in stages:
            stage.compile(**(compile if isinstance(compile, Mapping) else {}))
    takes_many = issubclass(kind, PipelineScheduleMulti)
    make: Any = kind
    made = make(stages if takes_many else stages[0], microbatches, loss_fn=loss_fn, **options)
    return BuiltPipeline(stages, made, cut, schedule_name(schedule) or schedule)


def _group_of(group: Any, axis: str) -> dist.ProcessGroup | None:
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    names = group.mesh_dim_names
    if group.ndim == 1:
        return group.get_group()
    if names is None or axis not in names:
        raise PipelineUsageError(
            f"the mesh has the axes {', '.join(names or ()) or 'without names'}, and none is {axis!r}: name the one "
            "that the pipeline goes along in axis="
        )
    return group[axis].get_group()


def _cut(
    model: nn.Module,
    count: int,
    by: str | Sequence[int],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layers: str | None,
    group: dist.ProcessGroup | None,
) -> Partition:
    row = list(find_layers(model, layers)[1].children())
    if not isinstance(by, str):
        sizes = list(by)
        if len(sizes) != count or sum(sizes) != len(row):
            raise PipelineUsageError(
                f"partition gives {len(sizes)} stages {sum(sizes)} layers, and there are {count} stages and {len(row)} "
                "layers"
            )
        return by if isinstance(by, Partition) else Partition(sizes, [float(size) for size in sizes])
    if by == "layers":
        return partition([1.0] * len(row), count)
    costs = model_costs(model, by, args, kwargs, layers)
    made: list[Any] = [partition(costs.layers, count, extra={0: costs.before, -1: costs.after})]
    dist.broadcast_object_list(made, group=group, group_src=0)
    return made[0]
