"""Every schedule with every way to wrap its stages: gradients scaled, summed and accumulated, the plain model's."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import api, ranks, reference
from tests.helpers.pipelines import EVERY_SCHEDULE, held_by, make_schedule, make_stages, stages_allowed, step
from tests.helpers.wrapped_models import (
    KINDS,
    MICROBATCHES,
    ON_8_RANKS,
    SCALINGS,
    WIDTH,
    WRAPPERS,
    Part,
    _ddp,
    _fsdp,
    batch_of,
    compare_with_plain,
    loss,
    mean_gradients,
    whole,
)

WARM = WRAPPERS
pytestmark = api.ours_only("reduces once a microbatch, scales twice, or refuses the mixture")


def _compare_all(rank: int, schedule: str, kinds: list[str]) -> list[str]:
    settings = [(kind, scaling) for kind in kinds for scaling in SCALINGS]
    return [line for setting in settings for line in compare_with_plain(rank, schedule, *setting)[:3]]


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_gradients_are_the_plain_models(schedule: str) -> None:
    results = ranks.run(_compare_all, 4, timeout=110, schedule=schedule, kinds=list(KINDS))
    assert results == [[]] * 4, "\n".join(line for result in results for line in result)


def _compare_on_8_ranks(rank: int, schedules: list[str]) -> list[str]:
    kinds = list(ON_8_RANKS)
    return [line for schedule in schedules for line in _compare_all(rank, schedule, kinds)]


def test_gradients_of_stages_that_are_parallel_in_two_ways_are_the_plain_models() -> None:
    schedules = ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
    assert ranks.run(_compare_on_8_ranks, 8, timeout=110, schedules=schedules) == [[]] * 8


def _bare_order(rank: int, kind: str) -> list[str]:
    """An order with sends and receives, and nothing about gathering and reducing, as older files have it."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    place, replica = mesh.get_coordinate()
    torch.manual_seed(1)
    plain = [Part() for _ in range(4)]
    held = held_by(place, "InterleavedZeroBubble", 2, 2)
    modules = {index: copy.deepcopy(plain[index]) for index in held}
    stages = make_stages(modules, 4, mesh["pipeline"].get_group())
    named = make_schedule("InterleavedZeroBubble", stages, MICROBATCHES, loss)
    about_stages = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
    order = {
        each: [action for action in actions if action.computation_type.value not in about_stages]
        for each, actions in named.pipeline_order_with_comms.items()
    }
    schedule = api.schedules._PipelineScheduleRuntime(stages, MICROBATCHES, loss_fn=loss)
    schedule._prepare_schedule_with_comms(order, format="compute_comms")
    for stage in stages:
        stage.submod = KINDS[kind][0](stage.submod, mesh)  # type: ignore[misc]
    wanted = mean_gradients(plain, range(2))
    batch = batch_of(replica)
    step(schedule, stages, batch)
    found = []
    for stage in stages:
        bare = [name for name, _ in plain[stage.stage_index].named_parameters()]
        for name, parameter in zip(bare, stage.submod.parameters(), strict=True):
            expected = wanted[stage.stage_index, name]
            found += reference.differences(f"{stage.stage_index} {name}", whole(parameter.grad), expected, exact=False)
    return found


@pytest.mark.parametrize("kind", ["FSDP2, after", "DDP, after", "replicate, after"])
def test_an_order_that_says_nothing_of_reducing_reduces(kind: str) -> None:
    assert ranks.run(_bare_order, 4, kind=kind) == [[]] * 4


class _Collectives(TorchDispatchMode):
    """Counts the collectives that this thread begins."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def _count(rank: int, schedules: list[str], kinds: list[str]) -> list[str]:
    """How many collectives a step has; each stage gathers once, and reduces once."""
    found = []
    for name in schedules:
        for kind in kinds:
            wrap: Any = KINDS[kind][0]
            if wrap is _fsdp:
                wrap = partial(
                    _fsdp, reshard_after_forward=False
                )  # else FSDP gathers for every forward, as it was told
            mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
            place = mesh.get_coordinate()[0]
            per_rank = stages_allowed(name, 2)[-1]
            modules = {index: Part() for index in held_by(place, name, 2, per_rank)}
            stages = make_stages(modules, 2 * per_rank, mesh["pipeline"].get_group())
            schedule = make_schedule(name, stages, MICROBATCHES, loss)
            for stage in stages:
                stage.submod = wrap(stage.submod, mesh)
            batch = batch_of(0)
            for number in range(3):
                with _Collectives() as got:
                    step(schedule, stages, batch)
                groups = 2 * per_rank  # two groups of parameters a stage
                wanted = {"_allgather_base_": groups, "_reduce_scatter_base_": groups}
                if kind.startswith(("DDP", "replicate")):
                    wanted = {"allreduce_": per_rank}
                if {key: got.counts[key] for key in wanted} != wanted:
                    found.append(f"{name}, {kind}, step {number}: {got.counts}, not {wanted}")
    return found


def test_each_stage_gathers_once_and_reduces_once_a_step() -> None:
    kinds = ["FSDP2, after", "DDP, after", "replicate, after"]
    assert ranks.run(_count, 4, schedules=EVERY_SCHEDULE, kinds=kinds) == [[]] * 4


def _changes(rank: int, schedules: list[str]) -> list[str]:
    """Wrap, unwrap, freeze, thaw and replace the stages of one pipeline rank between the steps of one schedule."""
    found = []
    for name in schedules:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
        place, replica = mesh.get_coordinate()
        per_rank = stages_allowed(name, 2)[-1]
        torch.manual_seed(1)
        plain = [Part() for _ in range(2 * per_rank)]
        changing = held_by(0, name, 2, per_rank)
        held = held_by(place, name, 2, per_rank)
        stages = make_stages(
            {index: copy.deepcopy(plain[index]) for index in held}, len(plain), mesh["pipeline"].get_group()
        )
        schedule = make_schedule(name, stages, MICROBATCHES, loss)
        for number, change in enumerate(["nothing", "DDP", "unwrapped", "frozen", "thawed", "replaced", "FSDP2"]):
            for stage in stages:
                if stage.stage_index in changing:
                    _change(stage, change, mesh)
            for index in changing:
                plain[index].up.weight.requires_grad_(change != "frozen")
                if change == "replaced":
                    plain[index].load_state_dict(_other(index).state_dict())
            reduced = change in ("DDP", "FSDP2")
            own = [mean_gradients(plain, [10 * number + data]) for data in range(2)]
            batch = batch_of(10 * number + replica)
            for stage in stages:
                stage.submod.zero_grad()
            step(schedule, stages, batch)
            for stage in stages:
                index = stage.stage_index
                bare = [n for n, _ in plain[index].named_parameters()]
                for key, parameter in zip(bare, stage.submod.parameters(), strict=True):
                    mine = own[replica][index, key]
                    if reduced and index in changing and mine is not None:
                        mine = (own[0][index, key] + own[1][index, key]) / 2  # type: ignore[operator]
                    where = f"{name}, {change}: stage {index} {key}"
                    found += reference.differences(where, whole(parameter.grad), mine, exact=False)
    return found


def _other(index: int) -> nn.Module:
    torch.manual_seed(100 + index)
    return Part()


def _change(stage: Any, change: str, mesh: Any) -> None:
    if change == "DDP":
        stage.submod = _ddp(stage.submod, mesh)
    elif change == "unwrapped":
        stage.submod = stage.submod.module
    elif change in ("frozen", "thawed"):
        stage.submod.up.weight.requires_grad_(change == "thawed")
    elif change == "replaced":
        stage.submod = _other(stage.stage_index)
    elif change == "FSDP2":
        _fsdp(stage.submod, mesh)


def test_what_a_program_changes_between_steps_is_seen_at_the_next_one() -> None:
    results = ranks.run(_changes, 4, timeout=110, schedules=EVERY_SCHEDULE)
    assert results == [[]] * 4, "\n".join(line for result in results for line in result[:9])


def _refused(rank: int, kind: str) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    place = mesh.get_coordinate()[0]
    stages = make_stages({place: Part()}, 2, mesh["pipeline"].get_group())
    schedule = make_schedule("1F1B", stages, MICROBATCHES, loss)
    if place == 1 and kind == "FSDP1":
        group = mesh["data"].get_group()
        stages[0].submod = FullyShardedDataParallel(Part(), process_group=group, device_id=torch.device("cpu"))
    elif place == 1:
        stages[0].submod = _ddp(Part(), mesh, static_graph=True)
    batch = batch_of(0)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        step(schedule, stages, batch)
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "says"), [("FSDP1", "use torch.distributed.fsdp.fully_shard"), ("static", "leave static_graph out")]
)
def test_wrappers_that_cannot_be_right_are_refused_on_every_rank(kind: str, says: str) -> None:
    for message in ranks.run(_refused, 4, kind=kind):
        assert "stage 1 is in a" in message and says in message, message


class Sometimes(Part):
    """A stage with a layer that no microbatch uses, and one that only the first of a step does."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.first, self.calls = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = super().forward(x)
        return x + self.first(x) if self.calls % MICROBATCHES == 1 else x


def _unused(rank: int, schedules: list[str]) -> list[str]:
    found = []
    for name in schedules:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
        place, replica = mesh.get_coordinate()
        per_rank = stages_allowed(name, 2)[-1]
        torch.manual_seed(1)
        plain = [Sometimes() for _ in range(2 * per_rank)]
        held = held_by(place, name, 2, per_rank)
        modules = {i: _ddp(copy.deepcopy(plain[i]), mesh, find_unused_parameters=True) for i in held}
        stages = make_stages(modules, len(plain), mesh["pipeline"].get_group())
        schedule = make_schedule(name, stages, MICROBATCHES, loss)
        for number in range(2):
            wanted = mean_gradients(plain, [10 * number + data for data in range(2)])
            for module in modules.values():
                module.zero_grad()
            batch = batch_of(10 * number + replica)
            step(schedule, stages, batch)
            for index in held:
                for key, parameter in modules[index].module.named_parameters():
                    where = f"{name}: step {number}, {index} {key}"
                    found += reference.differences(where, parameter.grad, wanted[index, key], exact=False)
    return found


def test_parameters_that_ddp_finds_unused_are_left_alone_and_those_used_once_are_reduced() -> None:
    assert ranks.run(_unused, 4, timeout=110, schedules=EVERY_SCHEDULE) == [[]] * 4
