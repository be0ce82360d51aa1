"""Parameters that several stages share: every copy gets the sum of all gradients, in every schedule and wrapping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import api, ranks, reference
from tests.helpers.models import Embeds, Reads
from tests.helpers.pipelines import EVERY_SCHEDULE, held_by, make_schedule, make_stages, stages_allowed

pytestmark = api.ours_only("keeps no parameters tied")

MICROBATCHES, ROWS, WORDS, WIDTH = 4, 8, 7, 6
WARM = "torch.distributed.fsdp"


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words, wanted = (torch.randint(WORDS, (ROWS,), generator=generator) for _ in range(2))
    return words, wanted


def _model(stages: int) -> list[nn.Module]:
    torch.manual_seed(4)
    modules: list[nn.Module] = [Embeds(), *(nn.Linear(WIDTH, WIDTH) for _ in range(stages - 2)), Reads()]
    modules[-1].head.weight = modules[0].embedding.weight
    return modules


def _wrap(module: nn.Module, kind: str, mesh: Any) -> nn.Module:
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(module, process_group=mesh["data"].get_group())
    if kind == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        return fully_shard(module, mesh=mesh["data"])
    return module


def _train(rank: int, schedules: list[str], kind: str, scale: bool) -> list[str]:
    """Three updates, the second without zeroing before it; what differs from the model with one tied parameter."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    place, replica = mesh.get_coordinate()
    found = []
    for name in schedules:
        per_rank = stages_allowed(name, 2)[-1]
        plain = _model(2 * per_rank)
        held = held_by(place, name, 2, per_rank)
        # One deep copy for all of a rank's stages, so that a V's ends share the parameter; FSDP2 wants it twice.
        shares = kind != "FSDP2" and {0, len(plain) - 1} <= set(held_by(0, name, 2, per_rank))
        mine = copy.deepcopy(nn.ModuleList([plain[index] for index in held]))
        modules = {i: m if shares else copy.deepcopy(m) for i, m in zip(held, mine, strict=True)}
        stages = make_stages(modules, len(plain), mesh["pipeline"].get_group())
        for stage in stages:
            if not shares and (stage.is_first or stage.is_last):
                stage.tie("embedding.weight" if stage.is_first else "head.weight", "words")
        schedule = make_schedule(name, stages, MICROBATCHES, _loss, scale_grads=scale)
        for stage in stages:
            stage.submod = _wrap(stage.submod, kind, mesh)
        data = 2 if kind != "plain" else 1
        learning = list({id(p): p for stage in stages for p in stage.submod.parameters()}.values())
        optimizers = [
            torch.optim.SGD(learning, lr=0.2),
            torch.optim.SGD(nn.ModuleList(plain).parameters(), lr=0.2),
        ]
        for step in range(3):
            if step != 1:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            for other in range(data):
                words, wanted = _batch(10 * step + (other if data > 1 else replica))
                for x, y in zip(words.chunk(MICROBATCHES), wanted.chunk(MICROBATCHES), strict=True):
                    for module in plain:
                        x = module(x)
                    (_loss(x, y) / (data * (MICROBATCHES if scale else 1))).backward()
            words, wanted = _batch(10 * step + replica)
            schedule.step(
                *((words,) if 0 in modules else ()), **({"target": wanted} if len(plain) - 1 in modules else {})
            )
            for stage in stages:
                expected = plain[stage.stage_index].parameters()
                for (key, parameter), theirs in zip(stage.submod.named_parameters(), expected, strict=True):
                    where = f"{name}, {kind}: step {step}, stage {stage.stage_index} {key}"
                    for what, a, b in (
                        ("grad", parameter.grad, theirs.grad),
                        ("", parameter.detach(), theirs.detach()),
                    ):
                        whole = a.full_tensor() if hasattr(a, "full_tensor") else a
                        found += reference.differences(f"{where} {what}", whole, b, exact=False)
            for optimizer in optimizers:
                optimizer.step()
    return found


@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "summed"])
@pytest.mark.parametrize("kind", ["plain", "DDP", "FSDP2"])
def test_tied_parameters_train_as_one(kind: str, scale: bool) -> None:
    results = ranks.run(_train, 4, schedules=EVERY_SCHEDULE, kind=kind, scale=scale)
    assert results == [[]] * 4, "\n".join(line for result in results for line in result[:9])


def _with_ties(rank: int, change: str) -> str:
    module = (Embeds if rank == 0 else Reads)()
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.5 if change != "values" else 0.5 + rank)
    if change == "shape" and rank == 1:
        module.head = nn.Linear(WIDTH, WORDS + 1, bias=False)
    stage = make_stages({rank: module}, 2)[0]
    if rank == 0 or change != "alone":
        stage.tie("embedding.weight" if rank == 0 else "head.weight", "words")
    schedule = make_schedule("1F1B", [stage], MICROBATCHES, _loss)
    words, wanted = _batch(0)
    with pytest.raises(ValueError) as raised:
        schedule.step(*((words,) if rank == 0 else ()), **({"target": wanted} if rank == 1 else {}))
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("values", "the values of 'words' are not the same"),
        ("shape", "the shape of 'words' is not the same"),
        ("alone", "only stage 0 on rank 0 ties 'words'"),
    ],
)
def test_what_cannot_be_one_parameter_is_refused_on_every_rank(change: str, says: str) -> None:
    for message in ranks.run(_with_ties, 2, change=change):
        assert says in message, message


def _frozen_on_one(rank: int) -> bool:
    """Frozen on the last stage only: nobody waits, and the first one still gets the sum of what there is."""
    module = _model(2)[rank]
    stage = make_stages({rank: module}, 2)[0]
    name = "embedding.weight" if rank == 0 else "head.weight"
    stage.tie(name, "words")
    schedule = make_schedule("1F1B", [stage], MICROBATCHES, _loss)
    words, wanted = _batch(0)
    if rank == 1:
        module.head.weight.requires_grad_(False)
    schedule.step(*((words,) if rank == 0 else ()), **({"target": wanted} if rank == 1 else {}))
    return module.get_parameter(name).grad is not None


def test_a_parameter_that_is_frozen_in_one_stage_leaves_nobody_waiting() -> None:
    assert ranks.run(_frozen_on_one, 2) == [True, False]


def test_a_name_that_is_no_parameter_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stage = make_stages({0: Embeds()}, 1)[0]
        with pytest.raises(ValueError, match="ties 'embeddings.weight', which is no parameter"):
            stage.tie("embeddings.weight", "words")
    finally:
        dist.destroy_process_group()


def _train_traced(rank: int, schedules: list[str]) -> list[str]:
    """A traced model's tied weights are tied by themselves."""
    found = []
    for name in schedules:
        count = 2 * stages_allowed(name, 2)[-1]
        plain = nn.Sequential(*_model(count))
        split = {str(index): api.SplitPoint.BEGINNING for index in range(1, count)}
        pipe = api.pipeline(copy.deepcopy(plain), (_batch(0)[0][:2],), split_spec=split)
        held = held_by(rank, name, 2, count // 2)
        stages = [pipe.build_stage(index, torch.device("cpu")) for index in held]
        schedule = make_schedule(name, stages, MICROBATCHES, _loss)
        learning = list({id(p): p for stage in stages for p in stage.submod.parameters()}.values())
        optimizers = [torch.optim.SGD(learning, lr=0.2), torch.optim.SGD(plain.parameters(), lr=0.2)]
        for step in range(2):
            words, wanted = _batch(step)
            for x, y in zip(words.chunk(MICROBATCHES), wanted.chunk(MICROBATCHES), strict=True):
                (_loss(plain(x), y) / MICROBATCHES).backward()
            schedule.step(*((words,) if 0 in held else ()), **({"target": wanted} if count - 1 in held else {}))
            for stage in stages:
                for key, parameter in stage.submod.named_parameters():
                    where = f"{name}: step {step}, stage {stage.stage_index} {key}"
                    theirs = plain.get_parameter(key)
                    found += reference.differences(f"{where} grad", parameter.grad, theirs.grad, exact=False)
                    found += reference.differences(where, parameter.detach(), theirs.detach(), exact=False)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return found


def test_tied_weights_of_a_traced_model_train_as_one() -> None:
    assert ranks.run(_train_traced, 2, timeout=110, schedules=EVERY_SCHEDULE) == [[]] * 2
