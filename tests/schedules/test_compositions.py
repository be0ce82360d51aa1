"""Every schedule with every way to wrap its stages: gradients scaled, summed and accumulated, the plain model's."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import api, ranks, reference
from tests.helpers.pipelines import EVERY_SCHEDULE, held_by, make_schedule, make_stages, stages_allowed, step

pytestmark = api.ours_only("reduces once a microbatch, scales twice, or refuses the mixture")

MICROBATCHES, ROWS, WIDTH = 4, 8, 8
WARM = "torch.distributed.fsdp torch.distributed.tensor.parallel torch.distributed._composable.replicate"
SCALINGS = ["scaled", "summed"]


class Part(nn.Module):
    """Two layers that tensor parallelism may split, and a norm that it leaves alone."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def _ddp(module: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module, process_group=mesh["data"].get_group(), **options)


def _fsdp(module: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.up, mesh=mesh["data"], **options)
    return fully_shard(module, mesh=mesh["data"])


def _fsdp_blocks(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.up, mesh=mesh["data"])
    fully_shard(module.down, mesh=mesh["data"])
    return module


def _replicate(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed._composable.replicate import replicate

    return replicate(module, process_group=mesh["data"].get_group())


def _replicate_fsdp(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return replicate(module, mesh=mesh["data"])


def _tensor_parallel(module: nn.Module, mesh: Any, *, local: bool = True) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(use_local_output=local)}
    return parallelize_module(module, mesh["tensor"], plan)


def _dtensors(module: nn.Module, mesh: Any) -> nn.Module:
    return _tensor_parallel(module, mesh, local=False)


def _fsdp_and_tensor_parallel(module: nn.Module, mesh: Any) -> nn.Module:
    return _fsdp(_tensor_parallel(module, mesh), mesh)


# name -> (how a stage's module is wrapped, the ranks of a pipeline stage that hold data and tensor shards, when)
KINDS: dict[str, tuple[Callable[..., nn.Module] | None, tuple[int, int], str]] = {
    "plain": (None, (2, 1), "before"),
    "DDP": (_ddp, (2, 1), "before"),
    "DDP, after": (_ddp, (2, 1), "after"),
    "DDP, views": (lambda m, mesh: _ddp(m, mesh, gradient_as_bucket_view=True), (2, 1), "before"),
    "DDP, unused": (lambda m, mesh: _ddp(m, mesh, find_unused_parameters=True), (2, 1), "after"),
    "FSDP2, before": (_fsdp, (2, 1), "before"),
    "FSDP2, after": (_fsdp, (2, 1), "after"),
    "FSDP2 of the blocks, after": (_fsdp_blocks, (2, 1), "after"),
    "replicate, before": (_replicate, (2, 1), "before"),
    "replicate, after": (_replicate, (2, 1), "after"),
    "replicate of FSDP2, after": (_replicate_fsdp, (2, 1), "after"),
    "TP": (_tensor_parallel, (1, 2), "after"),
    "TP, DTensors between": (_dtensors, (1, 2), "before"),
    "FSDP2 + TP": (_fsdp_and_tensor_parallel, (1, 2), "after"),
}


def _hybrid(module: nn.Module, mesh: Any) -> nn.Module:
    """Sharded over one dimension and replicated over the other; ranks that shard have the same data."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.up, mesh=mesh["data", "tensor"])
    return fully_shard(module, mesh=mesh["data", "tensor"])


ON_8_RANKS: dict[str, Any] = {
    "FSDP2 + TP of 8 ranks": (_fsdp_and_tensor_parallel, (2, 2), "after"),
    "HSDP of 8 ranks": (_hybrid, (2, 2), "after"),
}


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.to_local() if hasattr(output, "to_local") else output, target)


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _compare(rank: int, schedule_name: str, kind: str, scaling: str) -> list[str]:
    """Train: a scaled step and one that accumulates onto it, or a summed one; what differs from the plain model."""
    wrap, (data, tensor), when = (KINDS | ON_8_RANKS)[kind]
    mesh = dist.init_device_mesh("cpu", (2, data, tensor), mesh_dim_names=("pipeline", "data", "tensor"))
    place, replica, _ = mesh.get_coordinate()
    stages_per_rank = stages_allowed(schedule_name, 2)[-1]
    num_stages = 2 * stages_per_rank
    torch.manual_seed(1)
    plain = [Part(norm=kind != "TP, DTensors between") for _ in range(num_stages)]
    piped = {index: copy.deepcopy(plain[index]) for index in held_by(place, schedule_name, 2, stages_per_rank)}
    if wrap is not None and when == "before":
        piped = {index: wrap(module, mesh) for index, module in piped.items()}
    stages = make_stages(piped, num_stages, mesh["pipeline"].get_group())
    scale = scaling != "summed"
    schedule = make_schedule(schedule_name, stages, MICROBATCHES, _loss, scale_grads=scale)
    if wrap is not None and when == "after":
        for stage in stages:
            stage.submod = wrap(stage.submod, mesh)
    expected: Gradients = {}
    found: list[str] = []
    for number in range(2 if scale else 1):
        mean = _mean_gradients(plain, [10 * number + each for each in (range(data) if wrap else [replica])], scale)
        expected = {key: mean[key] + expected[key] for key in mean} if expected else mean  # type: ignore[operator]
        batch = _batch(10 * number + replica)
        step(schedule, stages, batch)
        for stage in stages:
            bare = [name for name, _ in plain[stage.stage_index].named_parameters()]
            for name, parameter in zip(bare, stage.submod.parameters(), strict=True):
                got, where = _whole(parameter.grad), f"{schedule_name}, {kind}, {scaling}: step {number}, {name}"
                if kind.startswith("FSDP2 of the blocks") and "norm" in name:
                    continue  # nobody reduces it
                found += reference.differences(
                    f"{where} of stage {stage.stage_index}", got, expected[stage.stage_index, name], exact=False
                )
    return found


Gradients = dict[tuple[int, str], Tensor | None]


def _mean_gradients(plain: list[nn.Module], seeds: Iterable[int], scale: bool = True) -> Gradients:
    """The plain model's gradients, by stage and name: the mean over the batches of these seeds."""
    places = [(index, name) for index, module in enumerate(plain) for name, _ in module.named_parameters()]
    of_batches = []
    for seed in seeds:
        reference.train_step(plain, _batch(seed), F.mse_loss, MICROBATCHES, scale=scale)
        of_batches.append([parameter.grad for module in plain for parameter in module.parameters()])
    means = [
        None if any(g is None for g in each) else sum(each) / len(each)
        for each in map(list, zip(*of_batches, strict=True))
    ]
    return dict(zip(places, means, strict=True))


def _batch(seed: int) -> reference.Batch:
    generator = torch.Generator().manual_seed(seed)
    return reference.Batch(
        (torch.randn(ROWS, WIDTH, generator=generator),), torch.randn(ROWS, WIDTH, generator=generator)
    )


def _compare_all(rank: int, schedule: str, kinds: list[str]) -> list[str]:
    return [line for kind in kinds for scaling in SCALINGS for line in _compare(rank, schedule, kind, scaling)[:3]]


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
    named = make_schedule("InterleavedZeroBubble", stages, MICROBATCHES, _loss)
    about_stages = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
    order = {
        each: [action for action in actions if action.computation_type.value not in about_stages]
        for each, actions in named.pipeline_order_with_comms.items()
    }
    schedule = api.schedules._PipelineScheduleRuntime(stages, MICROBATCHES, loss_fn=_loss)
    schedule._prepare_schedule_with_comms(order, format="compute_comms")
    for stage in stages:
        stage.submod = KINDS[kind][0](stage.submod, mesh)  # type: ignore[misc]
    wanted = _mean_gradients(plain, range(2))
    batch = _batch(replica)
    step(schedule, stages, batch)
    found = []
    for stage in stages:
        bare = [name for name, _ in plain[stage.stage_index].named_parameters()]
        for name, parameter in zip(bare, stage.submod.parameters(), strict=True):
            expected = wanted[stage.stage_index, name]
            found += reference.differences(f"{stage.stage_index} {name}", _whole(parameter.grad), expected, exact=False)
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
            schedule = make_schedule(name, stages, MICROBATCHES, _loss)
            for stage in stages:
                stage.submod = wrap(stage.submod, mesh)
            batch = _batch(0)
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
        schedule = make_schedule(name, stages, MICROBATCHES, _loss)
        for number, change in enumerate(["nothing", "DDP", "unwrapped", "frozen", "thawed", "replaced", "FSDP2"]):
            for stage in stages:
                if stage.stage_index in changing:
                    _change(stage, change, mesh)
            for index in changing:
                plain[index].up.weight.requires_grad_(change != "frozen")
                if change == "replaced":
                    plain[index].load_state_dict(_other(index).state_dict())
            reduced = change in ("DDP", "FSDP2")
            own = [_mean_gradients(plain, [10 * number + data]) for data in range(2)]
            batch = _batch(10 * number + replica)
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
                    found += reference.differences(where, _whole(parameter.grad), mine, exact=False)
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
    schedule = make_schedule("1F1B", stages, MICROBATCHES, _loss)
    if place == 1 and kind == "FSDP1":
        group = mesh["data"].get_group()
        stages[0].submod = FullyShardedDataParallel(Part(), process_group=group, device_id=torch.device("cpu"))
    elif place == 1:
        stages[0].submod = _ddp(Part(), mesh, static_graph=True)
    batch = _batch(0)
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
        schedule = make_schedule(name, stages, MICROBATCHES, _loss)
        for number in range(2):
            wanted = _mean_gradients(plain, [10 * number + data for data in range(2)])
            for module in modules.values():
                module.zero_grad()
            batch = _batch(10 * number + replica)
            step(schedule, stages, batch)
            for index in held:
                for key, parameter in modules[index].module.named_parameters():
                    where = f"{name}: step {number}, {index} {key}"
                    found += reference.differences(where, parameter.grad, wanted[index, key], exact=False)
    return found


def test_parameters_that_ddp_finds_unused_are_left_alone_and_those_used_once_are_reduced() -> None:
    assert ranks.run(_unused, 4, timeout=110, schedules=EVERY_SCHEDULE) == [[]] * 4
