"""Gradients clipped and unscaled over all stages: norms, clipped gradients and updates are the plain model's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import api, ranks, reference
from tests.helpers.models import Embeds, Reads
from tests.helpers.pipelines import held_by, make_schedule, make_stages, stages_allowed
from tests.helpers.wrapped_models import KINDS, WRAPPERS, Part, batch_of, loss, whole

WARM = WRAPPERS
pytestmark = api.ours_only("clips each rank by itself")

if not api.IS_TORCH:
    from pp_runtime import PipelineGradScaler, clip_grad_norm_

MICROBATCHES, ROWS, WORDS, WIDTH = 4, 8, 7, 6
NORMS = [float("inf"), 2.0, 1.0, 3.5]
# Of nobody's layers that data parallelism leaves alone.
WRAPPED = [name for name in KINDS if not name.startswith("FSDP2 of the blocks")]


def _differences(where: str, stages: list[Any], plain: list[nn.Module], *, gradients: bool = True) -> list[str]:
    found = []
    for stage in stages:
        pairs = zip(stage.submod.parameters(), plain[stage.stage_index].named_parameters(), strict=True)
        for mine, (name, theirs) in pairs:
            named = f"{where}, {name} of stage {stage.stage_index}"
            if gradients:
                found += reference.differences(f"{named} grad", whole(mine.grad), theirs.grad, exact=False)
            found += reference.differences(named, whole(mine.detach()), theirs.detach(), exact=False)
    return found


def _clip_both(where: str, stages: list[Any], plain: list[nn.Module], given: list[Any], **options: Any) -> list[str]:
    """Clip by one norm after another, each below what is there."""
    found = []
    parameters = list({id(p): p for module in plain for p in module.parameters()}.values())
    for place, order in enumerate(NORMS):
        most = 0.5 * torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], order).item()
        expected = torch.nn.utils.clip_grad_norm_(parameters, most, order)
        got = clip_grad_norm_(given, most, order, foreach=[None, False][place % 2], **options)
        found += reference.differences(f"{where}: norm {order}", got, expected, exact=False)
        found += _differences(f"{where}, clipped by norm {order}", stages, plain)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, got.item())
        if len(set(everybody)) > 1:
            found.append(f"{where}: norms {everybody}")
    return found


def _clip_wrapped(rank: int, schedule: str, kinds: list[str], frozen: bool) -> list[str]:
    found: list[str] = []
    for kind in kinds:
        wrap, (data, tensor), when = KINDS[kind]
        mesh = dist.init_device_mesh("cpu", (2, data, tensor), mesh_dim_names=("pipeline", "data", "tensor"))
        place, replica, _ = mesh.get_coordinate()
        per_rank = stages_allowed(schedule, 2)[-1]
        torch.manual_seed(1)
        plain: list[nn.Module] = [Part(norm=kind != "TP, DTensors between") for _ in range(2 * per_rank)]
        if frozen:
            plain[-1].requires_grad_(False)
        batches = [batch_of(other) for other in range(data)]
        if wrap is None:  # replicas that nobody reduces learn from the same batch
            batches = batches[:1] * data
        gradients = []
        for batch in batches:
            reference.train_step(plain, batch, F.mse_loss, MICROBATCHES)
            gradients.append([p.grad for module in plain for p in module.parameters()])
        for parameter, *each in zip(nn.ModuleList(plain).parameters(), *gradients, strict=True):
            parameter.grad = None if each[0] is None or not parameter.requires_grad else sum(each) / data
        piped = {index: copy.deepcopy(plain[index]) for index in held_by(place, schedule, 2, per_rank)}
        for module in piped.values():
            module.zero_grad()
        if wrap is not None and when == "before":
            piped = {index: wrap(module, mesh) for index, module in piped.items()}
        group = mesh["pipeline"].get_group()
        stages = make_stages(piped, len(plain), group)
        pipeline = make_schedule(schedule, stages, MICROBATCHES, loss)
        if wrap is not None and when == "after":
            for stage in stages:
                stage.submod = wrap(stage.submod, mesh)
        batch = batches[replica]
        pipeline.step(
            *(batch.args if 0 in piped else ()), **({"target": batch.target} if len(plain) - 1 in piped else {})
        )
        where = f"{schedule}, {kind}, frozen {frozen}"
        before = _differences(where, stages, plain)
        found += before or _clip_both(where, stages, plain, stages)
        # The same of modules, and of parameters, whose pipeline must be told.
        given: list[list[Any]] = [[s.submod for s in stages], [p for s in stages for p in s.submod.parameters()]]
        for each in given:
            found += _clip_both(where, stages, plain, each, group=group)
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["", "last stage frozen"])
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_the_norm_is_the_plain_models_however_stages_are_wrapped(schedule: str, frozen: bool) -> None:
    # DDP refuses a module with nothing to learn.
    kinds = [kind for kind in WRAPPED if not frozen or not kind.startswith(("DDP", "replicate, "))]
    results = ranks.run(_clip_wrapped, 4, timeout=110, schedule=schedule, kinds=kinds, frozen=frozen)
    assert results == [[]] * 4, "\n".join(line for result in results for line in result[:9])


def _clip_tied(rank: int, kind: str) -> list[str]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    place = mesh.get_coordinate()[0]
    found = []
    for schedule, declared in (("1F1B", True), ("ZBVZeroBubble", True), ("ZBVZeroBubble", False)):
        if kind == "FSDP2" and not declared:
            continue  # it wants no parameter in two modules
        count = 2 * stages_allowed(schedule, 2)[-1]
        torch.manual_seed(4)
        plain: list[Any] = [Embeds(), *(nn.Linear(WIDTH, WIDTH) for _ in range(count - 2)), Reads()]
        plain[-1].head.weight = plain[0].embedding.weight
        held = held_by(place, schedule, 2, count // 2)
        shared = copy.deepcopy(nn.ModuleList([plain[index] for index in held]))
        modules: dict[int, Any] = {
            index: copy.deepcopy(module) if declared else module for index, module in zip(held, shared, strict=True)
        }
        if kind == "FSDP2":
            from torch.distributed.fsdp import fully_shard

            modules = {index: fully_shard(module, mesh=mesh["data"]) for index, module in modules.items()}
        stages = make_stages(modules, count, mesh["pipeline"].get_group())
        for stage in stages:
            if declared and (stage.is_first or stage.is_last):
                stage.tie("embedding.weight" if stage.is_first else "head.weight", "words")
        pipeline = make_schedule(schedule, stages, MICROBATCHES, F.cross_entropy)
        generator = torch.Generator().manual_seed(2)
        words, wanted = (torch.randint(WORDS, (ROWS,), generator=generator) for _ in range(2))
        for x, y in zip(words.chunk(MICROBATCHES), wanted.chunk(MICROBATCHES), strict=True):
            (F.cross_entropy(nn.Sequential(*plain)(x), y) / MICROBATCHES).backward()
        pipeline.step(*((words,) if 0 in held else ()), **({"target": wanted} if count - 1 in held else {}))
        where = f"{schedule}, {kind}, tied {'by a label' if declared else 'as one object'}"
        found += _clip_both(where, stages, plain, stages)
        parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
        found += _clip_both(where, stages, plain, parameters, group=mesh["pipeline"].get_group())
    return found


@pytest.mark.parametrize("kind", ["plain", "FSDP2"])
def test_a_tied_parameter_counts_once(kind: str) -> None:
    results = ranks.run(_clip_tied, 4, kind=kind)
    assert results == [[]] * 4, "\n".join(line for result in results for line in result[:9])


def _parameter(gradient: Any) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    return parameter


def _raised(call: Callable[[], Any]) -> str:
    try:
        return f"nothing, but {call()}"
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)


def _clip_by_hand(rank: int) -> dict[str, Any]:
    """Gradients of every layout, on a pipeline of 2 ranks by 2 that hold parts of tensors."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "parts"))
    place, part = mesh.get_coordinate()
    group, parts = mesh["pipeline"].get_group(), mesh["parts"]

    def clip(*gradients: Any, most: float = 1e9, **options: Any) -> float:
        return clip_grad_norm_([_parameter(g) for g in gradients], most, group=group, **options).item()

    def laid_out(value: float, placement: Any) -> Any:
        return DTensor.from_local(torch.full((2,), value), parts, [placement], run_check=False)

    partial = _parameter(laid_out(1.0 + part, Partial()))  # 3, 3
    found: dict[str, Any] = {
        "partial": clip_grad_norm_(partial, 1.5, float("inf"), group=group).item(),
        "partial, after": partial.grad.full_tensor().tolist(),
        "sharded": clip(laid_out(1.0 + place, Shard(0))),  # 4 of 1 and 4 of 2
        "replicated": clip(laid_out(1.0 + place, Replicate())),  # 2 of 1 and 2 of 2
        "uneven": clip(*([laid_out(3.0, Shard(0))] if place == 0 else []), torch.full((2,), 4.0)),  # 4 of 3, 4 of 4
        "half": clip(torch.full((4,), 300.0 if place else 0.0, dtype=torch.float16)),  # its square is infinite
    }
    norms = [
        clip_grad_norm_([_parameter(torch.ones(1, dtype=dtype))], 9.0, group=group)
        for dtype in (torch.bfloat16, [torch.float32, torch.float64][place])
    ]
    found["dtypes"] = [str(norm.dtype) for norm in norms]
    indices, values = torch.tensor([[1, 1]]), torch.tensor([1.0, 2.0])
    found["sparse"] = clip(torch.sparse_coo_tensor(indices, values, (4,), check_invariants=False))  # 3 on each
    nan = torch.tensor([float("nan") if place == 1 else 1.0])
    found["nan"] = [clip(nan, norm_type=order) for order in (2.0, float("inf"))]
    found["raised"] = [
        _raised(lambda: clip(nan, error_if_nonfinite=True)),
        _raised(lambda: clip(nan, norm_type=0)),
        _raised(lambda: clip_grad_norm_([3.0], 1.0, group=group)),  # type: ignore[list-item]
    ]
    kept = make_stages({place: nn.Linear(1, 1)}, 4, group)
    found["one group"] = clip_grad_norm_(_parameter(torch.full((1,), 3.0)), 9.0).item()
    kept += make_stages({place: nn.Linear(1, 1)}, 4)
    found["raised"].append(_raised(lambda: clip_grad_norm_(_parameter(torch.ones(1)), 1.0)))
    return found


def test_gradients_of_every_layout() -> None:
    for found in ranks.run(_clip_by_hand, 4):
        assert found["partial"] == 3.0 and found["partial, after"] == pytest.approx([1.5, 1.5], rel=1e-5)
        assert found["sharded"] == pytest.approx(20**0.5) and found["replicated"] == pytest.approx(10**0.5)
        assert found["uneven"] == pytest.approx(100**0.5) and found["half"] == pytest.approx(600.0)
        assert found["dtypes"] == ["torch.float32", "torch.float64"]
        assert found["sparse"] == pytest.approx(18**0.5)
        assert all(norm != norm for norm in found["nan"])
        assert found["one group"] == pytest.approx(18**0.5)
        nonfinite, order, kind, groups = found["raised"]
        assert "may be of 2 pipelines" in groups
        assert "non-finite" in nonfinite and "norm_type is 0" in order and "takes stages" in kind


class Mixed(nn.Module):
    """Computes in float16 with float32 parameters; or all in float32, where sums in another order must agree."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half_precision = half
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=self.half_precision):
            return self.down(torch.tanh(self.up(x))).float()


def _fsdp(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=mesh["data"])


def _tp(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(module, mesh["data"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


SCALED: dict[str, Callable[[nn.Module, Any], nn.Module]] = {"plain": lambda m, mesh: m, "FSDP2": _fsdp, "TP": _tp}


def _scale(rank: int, schedule: str, fused: bool) -> list[str]:
    """Steps with an infinity on each rank in turn, between good ones that the plain model does with torch's scaler."""
    found: list[str] = []
    for kind, wrap in SCALED.items():
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
        place = mesh.get_coordinate()[0]
        torch.manual_seed(3)
        count = 2 * stages_allowed(schedule, 2)[-1]
        plain: list[nn.Module] = [Mixed(half=kind != "TP") for _ in range(count)]
        held = held_by(place, schedule, 2, count // 2)
        modules = {index: wrap(copy.deepcopy(plain[index]), mesh) for index in held}
        stages = make_stages(modules, count, mesh["pipeline"].get_group())
        options = {"init_scale": 2.0**10, "growth_interval": 2}
        scaler, theirs = PipelineGradScaler("cpu", **options), torch.amp.GradScaler("cpu", **options)
        pipeline = make_schedule(schedule, stages, MICROBATCHES, scaler.scale_loss(F.mse_loss))
        learning = [p for stage in stages for p in stage.submod.parameters()]
        optimizer, plain_optimizer = (
            # A large eps, so that the update does not hang on the last bits of a gradient. DTensors know no fused SGD.
            torch.optim.AdamW(parameters, lr=0.5, eps=1.0, fused=True)
            if fused
            else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            for parameters in (learning, nn.ModuleList(plain).parameters())
        )

        def plain_loss(output: Tensor, target: Tensor, theirs: Any = theirs) -> Tensor:
            return theirs.scale(F.mse_loss(output, target))

        for number in range(6):
            broken = number - 1  # the rank that has an infinity
            batch = reference.Batch((torch.randn(ROWS, WIDTH),), torch.randn(ROWS, WIDTH))
            for each in (optimizer, plain_optimizer):
                each.zero_grad()
            outcome = reference.train_step(plain, batch, plain_loss, MICROBATCHES)
            losses: list[Tensor] = []
            pipeline.step(
                *(batch.args if 0 in held else ()),
                **({"target": batch.target, "losses": losses} if count - 1 in held else {}),
            )
            where = f"{schedule}, {kind}, step {number}"
            scale = theirs.get_scale()
            expected = [loss / scale for loss in outcome.losses] if count - 1 in held else []
            found += reference.differences(f"{where} losses", losses, expected, exact=False)
            if 0 <= broken < 4:
                if rank == broken:
                    local = learning[0].grad
                    getattr(local, "_local_tensor", local).view(-1)[0] = float("inf")
                next(plain[0].parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
            elif not fused:
                scaler.unscale_(optimizer)
                theirs.unscale_(plain_optimizer)
                norms = [
                    clip_grad_norm_(stages, 0.1),
                    torch.nn.utils.clip_grad_norm_(nn.ModuleList(plain).parameters(), 0.1),
                ]
                found += reference.differences(f"{where} norms", *norms, exact=False)
            before = [p.detach().clone() for p in learning]
            for one, update in ((scaler, optimizer), (theirs, plain_optimizer)):
                one.step(update)
                one.update()
            stayed = all(torch.equal(whole(a), whole(b.detach())) for a, b in zip(before, learning, strict=True))
            if stayed != (0 <= broken < 4):
                found.append(f"{where}: parameters {'stayed' if stayed else 'changed'}")
            if scaler.get_scale() != theirs.get_scale():
                found.append(f"{where}: scale {scaler.get_scale()}, not {theirs.get_scale()}")
            found += _differences(where, stages, plain, gradients=False)
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_an_infinity_on_any_rank_skips_the_update_on_all(schedule: str, fused: bool) -> None:
    results = ranks.run(_scale, 4, timeout=110, schedule=schedule, fused=fused)
    assert results == [[]] * 4, "\n".join(line for result in results for line in result[:9])


def _scale_without_gradients(rank: int) -> tuple[list[float], str]:
    """Rank 1 has none; then rank 0 has float16 ones."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), PipelineGradScaler("cpu", init_scale=4.0)
    for value in (4.0, float("inf")):
        if rank == 0:
            parameter.grad = torch.full((2,), value)
        scaler.step(optimizer)
        scaler.update()
    half = nn.Parameter(torch.ones(2, dtype=torch.float16 if rank == 0 else torch.float32))
    half.grad = torch.ones_like(half)
    raised = _raised(lambda: scaler.unscale_(torch.optim.SGD([half])))
    off = PipelineGradScaler("cpu", enabled=False)
    off.step(optimizer)
    off.update()
    return [*parameter.tolist(), scaler.get_scale()], raised


def test_ranks_without_gradients_follow_the_scale_and_float16_ones_are_refused_by_all() -> None:
    for rank, (values, raised) in enumerate(ranks.run(_scale_without_gradients, 2)):
        assert values == ([float("-inf")] * 2 if rank == 0 else [1.0, 1.0]) + [2.0], values
        assert "float16" in raised, raised


def _flat(rank: int) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    module = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    return _raised(lambda: clip_grad_norm_(module, 1.0, group=dist.group.WORLD))


def test_shards_that_cannot_be_told_from_whole_gradients_are_refused() -> None:
    assert all("fully_shard" in text for text in ranks.run(_flat, 2))
