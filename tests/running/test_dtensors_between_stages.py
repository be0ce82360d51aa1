"""DTensors that go from stage to stage: each rank's shard travels, in the placements that it has, both ways."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import api, ranks
from tests.helpers.pipelines import EVERY_SCHEDULE, backward_orders, held_by, make_schedule, stages_allowed

pytestmark = api.ours_only("wants a run of the model to infer what is sent")

MICROBATCHES, ROWS, WIDTH = 4, 8, 6
WARM = "torch.distributed.tensor.parallel"


class Mlp(nn.Module):
    """Two layers behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


def _parallel(module: nn.Module, mesh: Any, sharded: bool) -> nn.Module:
    """Split over the mesh; activations between the stages are replicated, or sharded along the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    layout = Shard(1) if sharded else Replicate()
    plan: dict[str, Any] = {
        "up": ColwiseParallel(input_layouts=layout, use_local_output=False),
        "down": RowwiseParallel(output_layouts=layout, use_local_output=False),
    }
    if sharded:
        plan["norm"] = SequenceParallel(use_local_output=False)
        return parallelize_module(module, mesh, plan)
    parallelize_module(module, mesh, plan)
    for name, parameter in list(module.norm.named_parameters()):
        from torch.distributed.tensor import distribute_tensor

        module.norm.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Replicate()])))
    return module


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


def _same(where: str, got: Any, expected: Any) -> list[str]:
    """Says where two DTensors differ, their placements and local parts included."""
    if got is None or expected is None:
        return [] if got is expected else [f"{where}: {got}, not {expected}"]
    if got.placements != expected.placements or got.shape != expected.shape:
        return [f"{where}: {got.placements} {got.shape}, not {expected.placements} {expected.shape}"]
    return [] if torch.equal(got.to_local(), expected.to_local()) else [f"{where}: local parts differ"]


def _train(rank: int, schedule: str, sharded: bool, with_get_mesh: bool) -> list[str]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "tensor"))
    place = mesh.get_coordinate()[0]
    per_rank = stages_allowed(schedule, 2)[-1]
    torch.manual_seed(0)
    modules = [Mlp() for _ in range(2 * per_rank)]
    plain = [_parallel(copy.deepcopy(module), mesh["tensor"], sharded) for module in modules]
    held = held_by(place, schedule, 2, per_rank)
    asked: list[Any] = []

    def get_mesh(names: tuple[str, ...], layout: Any) -> Any:
        asked.append(names)
        return mesh["tensor"]

    options = {"get_mesh": get_mesh} if with_get_mesh else {}
    stages = [
        api.PipelineStage(
            _parallel(modules[index], mesh["tensor"], sharded), index, len(modules), torch.device("cpu"),
            group=mesh["pipeline"].get_group(), **options,
        )
        for index in held
    ]  # fmt: skip
    pipeline = make_schedule(schedule, stages, MICROBATCHES, _loss)
    first, last = 0 in held, len(modules) - 1 in held
    placement = [Shard(1) if sharded else Replicate()]
    found = []
    for step in range(2):
        torch.manual_seed(10 + step)
        whole, wanted = torch.randn(ROWS, 5, WIDTH), torch.randn(ROWS, 5, WIDTH)  # 5 of the sequence: uneven shards
        x, y = (distribute_tensor(each, mesh["tensor"], placement) for each in (whole, wanted))
        for module in (*plain, *modules):
            module.zero_grad()
        expected_outputs, expected_losses = [], []
        orders = {stage: list(range(MICROBATCHES)) for stage in range(len(plain))}
        gradients: dict[tuple[int, str], list[Any]] = {}
        for a, b in zip(whole.chunk(MICROBATCHES), wanted.chunk(MICROBATCHES), strict=True):
            value, target = (distribute_tensor(each, mesh["tensor"], placement) for each in (a, b))
            for module in plain:
                value = module(value)
            loss = _loss(value, target)
            loss.backward()
            expected_outputs.append(value.detach())
            expected_losses.append(loss.detach())
            for index, module in enumerate(plain):
                for name, parameter in module.named_parameters():
                    gradients.setdefault((index, name), []).append(parameter.grad)
                module.zero_grad()
        losses: list[Tensor] = []
        output = pipeline.step(*((x,) if first else ()), **({"target": y, "losses": losses} if last else {}))
        orders |= backward_orders(pipeline)
        for index in held:
            for name, parameter in modules[index].named_parameters():
                each = gradients[index, name]
                total = each[orders[index][0]].to_local().clone()
                for microbatch in orders[index][1:]:
                    total += each[microbatch].to_local()
                where = f"{schedule}, step {step}, stage {index} {name}"
                if parameter.grad.placements != each[0].placements:
                    found.append(f"{where}: {parameter.grad.placements}, not {each[0].placements}")
                elif not torch.equal(parameter.grad.to_local(), total / MICROBATCHES):
                    found.append(f"{where}: off")
        evaluated = pipeline.eval(*((x,) if first else ()))
        if last:
            for got in (output, evaluated):
                rows = got.to_local().chunk(MICROBATCHES)
                same = all(torch.equal(a, b.to_local()) for a, b in zip(rows, expected_outputs, strict=True))
                found += [] if same and got.placements == tuple(placement) else [f"{schedule}, step {step}: outputs"]
            found += [line for a, b in zip(losses, expected_losses, strict=True) for line in _same("loss", a, b)]
    if with_get_mesh and asked and set(asked) != {("tensor",)}:
        found.append(f"asked for {asked}")
    return found


def _train_every_schedule(rank: int, sharded: bool) -> list[str]:
    return [line for name in EVERY_SCHEDULE for line in _train(rank, name, sharded, with_get_mesh=name != "1F1B")]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_training_equals_the_tensor_parallel_models_placements_included(sharded: bool) -> None:
    assert ranks.run(_train_every_schedule, 4, sharded=sharded) == [[]] * 4


def _train_over_gloo(rank: int) -> list[str]:
    import os

    os.environ["PP_RUNTIME_TRANSPORT"] = "c10d"
    return _train(rank, "ZBVZeroBubble", True, False) + _train(rank, "1F1B", False, True)


def test_the_same_over_c10d() -> None:
    assert ranks.run(_train_over_gloo, 4) == [[]] * 4


class Both(NamedTuple):
    """What goes to the next stage: a replicated, a sharded and a plain tensor, on two meshes."""

    a: Tensor
    b: Tensor
    scale: Tensor


class Mixed(nn.Module):
    """Takes and gives DTensors of two meshes, in a dictionary, beside a plain tensor and a number."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.rand(())), last

    def forward(self, inputs: dict[str, Any]) -> Any:
        a, b, count = inputs["a"] * 2, (inputs["b"][0] * 3,), inputs["count"] + 1
        scale = inputs["scale"] * self.weight
        if self.last:
            return a.full_tensor().sum() * scale + b[0].full_tensor().sum() + count
        return {"a": a, "b": b, "count": count, "scale": scale}


def _train_mixed(rank: int) -> list[str]:
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = dist.init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pipeline", "x", "y"))
    place = mesh.get_coordinate()[0]
    group = mesh["pipeline"].get_group()
    meshes = {("x", "y"): mesh["x", "y"], ("y",): mesh["y"]}
    stage = api.PipelineStage(
        Mixed(last=place == 1), place, 2, torch.device("cpu"), group=group,
        get_mesh=lambda names, layout: meshes[names],
    )  # fmt: skip
    torch.manual_seed(3 + rank % 4)
    leaves = [torch.rand(2, 3, requires_grad=True) for _ in range(2)]

    def inputs() -> dict[str, Any]:
        a = DTensor.from_local(leaves[0], mesh["x", "y"], (Shard(0), Partial()), run_check=False)
        b = DTensor.from_local(leaves[1], mesh["y"], (Shard(1),), run_check=False)
        return {"a": a, "b": (b,), "count": 1, "scale": torch.ones(())}

    schedule = make_schedule("1F1B", [stage], 1, lambda output, target: output)
    schedule._step_microbatches([(inputs(),)] if place == 0 else None, None, [None] if place == 1 else None)
    if place == 1:
        return []
    got = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    first, second = Mixed(last=False), Mixed(last=True)
    torch.manual_seed(1)
    second.weight.data.copy_(_stage_weight(group))
    first.weight.data.copy_(stage.submod.weight.data)
    second(first(inputs())).backward()
    return [
        f"leaf {n}: {g} not {leaf.grad}"
        for n, (g, leaf) in enumerate(zip(got, leaves, strict=True))
        if not torch.allclose(g, leaf.grad)
    ]


def _stage_weight(group: Any) -> float:
    """Every rank's module is made after the same seed, so the last stage's weight is the first's."""
    torch.manual_seed(0)
    return torch.rand(()).item()


def test_two_meshes_two_dimensions_and_plain_tensors_in_one_message() -> None:
    assert ranks.run(_train_mixed, 8) == [[]] * 8


class GivesDTensor(nn.Module):
    """Gives a DTensor, on a mesh that the next stage has never seen."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.layer, self.mesh = nn.Linear(WIDTH, WIDTH), mesh

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(self.layer(x), self.mesh, (Replicate(),), run_check=False)


def _without_mesh(rank: int, answer: str) -> str:
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("pipeline", "tensor"))
    module = GivesDTensor(mesh["tensor"]) if rank == 0 else nn.Linear(WIDTH, WIDTH)
    options: dict[str, Any] = {"none": {"get_mesh": lambda names, layout: None}, "other": {
        "get_mesh": lambda names, layout: mesh["pipeline"]}, "missing": {}}[answer]  # fmt: skip
    stage = api.PipelineStage(module, rank, 2, torch.device("cpu"), **options)
    schedule = make_schedule("1F1B", [stage], 2, F.mse_loss)
    x = torch.randn(4, WIDTH)
    with pytest.raises(RuntimeError) as raised:
        schedule.step(*((x,) if rank == 0 else ()), **({"target": x} if rank == 1 else {}))
    return str(raised.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("missing", "pass PipelineStage(..., get_mesh="),
        ("none", "get_mesh gave None"),
        ("other", "get_mesh gave a mesh of"),
    ],
)
def test_a_mesh_that_is_not_to_be_had_is_an_error_on_every_rank(answer: str, says: str) -> None:
    for message in ranks.run(_without_mesh, 2, answer=answer):
        assert says in message and "stage 1" in message and "('tensor',)" in message, message
