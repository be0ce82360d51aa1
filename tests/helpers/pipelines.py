"""One rank's part of a pipeline, and the comparison of its training with the unpipelined model's."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.helpers import api, hard_models, models, reference
from tests.helpers.reference import Batch

MODELS = models.MODELS | hard_models.MODELS

ONE_STAGE = ["GPipe", "1F1B"] + ([] if api.IS_TORCH else ["ZB1P", "ZB2P"])
LOOPED = ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble"] + ([] if api.IS_TORCH else ["Auto"])
V_SHAPED = ["ZBVZeroBubble", "DualPipeV"] + ([] if api.IS_TORCH else ["VHalf", "VMin"])
EVERY_SCHEDULE = ONE_STAGE + LOOPED + V_SHAPED
SPLITTING = [name for name in EVERY_SCHEDULE if name not in ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B")]


@dataclass(frozen=True)
class Setting:
    """What one comparison runs; its text names it where it fails."""

    schedule: str
    microbatches: int
    stages_per_rank: int = 1
    model: str = "mlp"
    rows: int | None = None  # two a microbatch where not given
    steps: int = 2

    def __str__(self) -> str:
        given = [
            f"{field.name}={value}" for field in fields(self) if (value := getattr(self, field.name)) != field.default
        ]
        return ", ".join(given)


def stages_allowed(schedule: str, most: int = 3) -> list[int]:
    """How many stages a rank may hold."""
    if schedule in ONE_STAGE:
        return [1]
    return [2] if schedule in V_SHAPED else list(range(1, most + 1))


def placement(schedule: str, ranks: int, stages_per_rank: int) -> list[int]:
    """The rank of every stage."""
    if schedule in V_SHAPED:
        return [*range(ranks), *reversed(range(ranks))]
    return [stage % ranks for stage in range(ranks * stages_per_rank)]


def held_by(rank: int, schedule: str, ranks: int, stages_per_rank: int) -> list[int]:
    """The stages of a rank."""
    return [stage for stage, owner in enumerate(placement(schedule, ranks, stages_per_rank)) if owner == rank]


_device = torch.device("cpu")


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Where stages are made, and what they are given: on the CPU outside of this."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def make_stages(
    modules: Mapping[int, nn.Module], num_stages: int, group: dist.ProcessGroup | None = None, **options: Any
) -> list[Any]:
    """Pipeline stages around this rank's modules, which are moved if the stages are not on the CPU."""
    if _device.type != "cpu":
        modules = {index: module.to(_device) for index, module in modules.items()}
    return [
        api.PipelineStage(module, index, num_stages, _device, group=group, **options)
        for index, module in modules.items()
    ]


def make_schedule(name: str, stages: Sequence[Any], microbatches: int, loss_fn: Any, **options: Any) -> Any:
    """A schedule of the class named, which takes a stage or a list of stages as its kind demands."""
    kind = api.schedules.get_schedule_class(name)
    single = issubclass(kind, api.schedules.PipelineScheduleSingle)
    return kind(stages[0] if single else list(stages), microbatches, loss_fn=loss_fn, **options)


def step(schedule: Any, stages: Sequence[Any], batch: Batch, method: str = "step", **options: Any) -> reference.Outcome:
    """One step as users write it: inputs where the first stage is, target and losses where the last one is."""
    first, last = any(stage.is_first for stage in stages), any(stage.is_last for stage in stages)
    losses: list[torch.Tensor] = []
    batch = batch.to(_device)
    if last and batch.target is not None:
        options |= {"target": batch.target, "losses": losses}
    output = getattr(schedule, method)(*(batch.args if first else ()), **options, **(batch.kwargs or {}))
    return reference.Outcome(output, losses)


def backward_orders(schedule: Any) -> dict[int, list[int]]:
    """In which order each stage of every rank adds up its microbatches' gradients; nothing for ascending ones."""
    kinds = (api.schedules.FULL_BACKWARD, api.schedules.BACKWARD_WEIGHT)
    orders: dict[int, list[int]] = {}
    for actions in (getattr(schedule, "pipeline_order", None) or {}).values():
        for action in actions:
            for part in (action.sub_actions or (action,)) if action is not None else ():
                if part.computation_type in kinds:
                    orders.setdefault(part.stage_index, []).append(part.microbatch_index)
    return orders


class Twins:
    """A pipeline, of which this rank holds a part, and the plain model, trained side by side."""

    def __init__(
        self,
        rank: int,
        setting: Setting,
        group: dist.ProcessGroup | None = None,
        owners: Sequence[int] | None = None,
        make: Callable[..., Any] | None = None,
        **schedule_options: Any,
    ) -> None:
        """``owners`` (the rank of each stage) and ``make`` take the place of the named schedule's own.

        The plain model is on the CPU, wherever the pipeline is.
        """
        ranks = dist.get_world_size(group)
        owners = owners or placement(setting.schedule, ranks, setting.stages_per_rank)
        self.setting, self.num_stages = setting, len(owners)
        self.example = models.build(MODELS[setting.model], self.num_stages)
        self.same_kernels = _device.type == "cpu"
        self.scale = schedule_options.get("scale_grads", True)
        piped = copy.deepcopy(self.example.stages)
        self.plain = nn.ModuleList(self.example.stages)
        self.mine = {index: piped[index] for index, owner in enumerate(owners) if owner == rank}
        self.stages = make_stages(self.mine, self.num_stages, group)
        arguments = (self.stages, setting.microbatches, self.example.loss_fn)
        self.schedule = (
            make(*arguments, **schedule_options)
            if make
            else make_schedule(setting.schedule, *arguments, **schedule_options)
        )
        self.optimizers = [optimizer_of(self.plain), optimizer_of(nn.ModuleList(self.mine.values()))]

    @property
    def holds_last(self) -> bool:
        return self.num_stages - 1 in self.mine

    @property
    def exact(self) -> bool:
        return self.example.exact and self.same_kernels

    def train(self, name: str, batch: Batch) -> list[str]:
        """One step and one update on both; say what of this rank's differs."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        expected = reference.train_step(
            self.example.stages,
            batch,
            self.example.loss_fn,
            self.setting.microbatches,
            backward_orders(self.schedule),
            self.scale,
        )
        got = step(self.schedule, self.stages, batch)
        found = differences_of_step(name, got, expected, last=self.holds_last, exact=self.exact)
        found += self.differences(name)
        for optimizer in self.optimizers:
            optimizer.step()
        return found

    def evaluate(self, name: str, batch: Batch) -> list[str]:
        """Outputs and losses of both without a backward; gradients must stay as they were."""
        expected = reference.evaluate(self.example.stages, batch, self.setting.microbatches, self.example.loss_fn)
        got = step(self.schedule, self.stages, batch, "eval")
        found = differences_of_step(name, got, expected, last=self.holds_last, exact=self.exact)
        return found + self.differences(name)

    def differences(self, name: str) -> list[str]:
        """Compare parameters, gradients and buffers."""
        return [
            line
            for index, module in self.mine.items()
            for line in differences_of_modules(f"{name}, stage {index}", module, self.plain[index], self.exact)
        ]


def compare(rank: int, setting: Setting, group: dist.ProcessGroup | None = None, **options: Any) -> list[str]:
    """Train twins for the setting's steps; say what of this rank's differs, empty when nothing does."""
    twins = Twins(rank, setting, group, **options)
    rows = setting.rows or 2 * setting.microbatches
    found = [
        line
        for number in range(setting.steps)
        for line in twins.train(f"step {number}", twins.example.batch(rows, number))
    ]
    return found + twins.differences("after training")


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, so that one step's error is seen in the next ones; a rank may have nothing to learn."""
    parameters = [*module.parameters()] or [nn.Parameter(torch.zeros(1))]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def differences_of_step(
    name: str, got: reference.Outcome, expected: reference.Outcome, *, last: bool, exact: bool = True
) -> list[str]:
    """Compare what a step gave back on a rank that holds the last stage, or that it gave nothing where not."""
    if not last:
        return [] if got.outputs is None and not got.losses else [f"{name}: a rank without the last stage got {got}"]
    found = reference.differences(f"{name} output", got.outputs, expected.outputs, exact)
    return found + reference.differences(f"{name} losses", got.losses, expected.losses, exact)


def differences_of_modules(name: str, got: nn.Module, expected: nn.Module, exact: bool = True) -> list[str]:
    """Compare parameters, gradients and buffers."""
    found = []
    for (key, mine), theirs in zip(got.named_parameters(), expected.parameters(), strict=True):
        found += reference.differences(f"{name} {key}", mine.detach(), theirs.detach(), exact)
        found += reference.differences(f"{name} {key}.grad", mine.grad, theirs.grad, exact)
    for (key, mine_too), theirs_too in zip(got.named_buffers(), expected.buffers(), strict=True):
        found += reference.differences(f"{name} {key}", mine_too, theirs_too, exact)
    return found


def compare_all(rank: int, settings: Iterable[Setting], **options: Any) -> None:
    """Compare setting after setting; raise one error that names each that differs, or the one that raised."""
    found = []
    for setting in settings:
        try:
            differing = compare(rank, setting, **options)
        except ValueError as error:
            if api.IS_TORCH and "microbatches" in str(error):
                continue  # a count that torch refuses
            raise AssertionError(f"[{setting}] raised\n{traceback.format_exc()}") from None
        except Exception:
            raise AssertionError(f"[{setting}] raised\n{traceback.format_exc()}") from None
        found += [f"[{setting}] {line}" for line in differing[:4]]
    if found:
        raise AssertionError("\n".join(["differs from the plain model:", *found]))
