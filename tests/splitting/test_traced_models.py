"""Traced models train as the untraced ones: GPT-2-like, BERT-like, and with skips over several stages."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from tests.helpers import api, ranks, reference, traced
from tests.helpers.pipelines import (
    backward_orders,
    differences_of_step,
    held_by,
    make_schedule,
    step,
)

WARM = "tests.helpers.traced"
MODELS = sorted(traced.SPLITS)
ROWS = 6


def _compare(rank: int, name: str, schedules: list[str], stages_per_rank: int) -> list[str]:
    """Train traced stages and the plain module for two steps under each schedule."""
    ranks_count = dist.get_world_size()
    num_stages = ranks_count * stages_per_rank
    plain, loss_fn = traced.build(name), functools.partial(traced.loss_of, name)
    pipe = traced.trace(name, num_stages)
    found = []
    for schedule in schedules:
        held = held_by(rank, schedule, ranks_count, stages_per_rank)
        modules = {index: pipe.get_stage_module(index) for index in held}
        stages = [pipe.build_stage(index, torch.device("cpu")) for index in held]
        pipeline = make_schedule(schedule, stages, 3, loss_fn)
        for number in range(2):
            batch = traced.batch(name, ROWS, number)
            orders = backward_orders(pipeline)
            expected = reference.train_step([plain], batch, loss_fn, 3, {0: orders.get(0, range(3))})
            for module in modules.values():
                module.zero_grad()
            got = step(pipeline, stages, batch)
            where = f"{schedule} step {number}"
            found += differences_of_step(where, got, expected, last=num_stages - 1 in held, exact=False)
            for module in modules.values():
                for key, parameter in module.named_parameters():
                    theirs = plain.get_parameter(key).grad
                    found += reference.differences(f"{where} {key}.grad", parameter.grad, theirs, exact=False)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [2, 4])
def test_single_stage_schedules_equal_the_untraced_model(count: int, name: str) -> None:
    if api.IS_TORCH and name == "skips":
        pytest.skip("torch: brings inputs to the first stage only")
    schedules = ["GPipe"] + ([] if api.IS_TORCH and count > 3 else ["1F1B"])
    assert ranks.run(_compare, count, name=name, schedules=schedules, stages_per_rank=1) == [[]] * count


@api.ours_only("schedules of several stages a rank refuse skips")
@pytest.mark.parametrize("name", MODELS)
def test_schedules_of_several_stages_a_rank_equal_the_untraced_model(name: str) -> None:
    schedules = ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
    assert ranks.run(_compare, 2, name=name, schedules=schedules, stages_per_rank=2) == [[], []]


def _evaluate(rank: int, name: str) -> list[str]:
    """Evaluation before, between and after training steps."""
    plain, loss_fn = traced.build(name), functools.partial(traced.loss_of, name)
    stages = [traced.trace(name, 2).build_stage(rank, torch.device("cpu"))]
    pipeline = make_schedule("1F1B", stages, 3, loss_fn)
    found = []
    for number, method in enumerate(["eval", "step", "eval"]):
        batch = traced.batch(name, ROWS, number)
        got = step(pipeline, stages, batch, method)
        expected = reference.evaluate([plain], batch, 3, loss_fn)
        found += differences_of_step(f"{method} {number}", got, expected, last=rank == 1, exact=False)
    return found


@api.ours_only("brings inputs to the first stage only")
@pytest.mark.parametrize("name", MODELS)
def test_traced_models_are_evaluated_between_steps(name: str) -> None:
    assert ranks.run(_evaluate, 2, name=name) == [[], []]


def _pass_by_keyword(rank: int, schedule: str, giver: int) -> list[str]:
    """The mask goes in by keyword on one rank, everything else on the first."""
    per_rank = 1 if schedule == "GPipe" else 2
    plain, loss_fn = traced.build("skips"), functools.partial(traced.loss_of, "skips")
    pipe = traced.trace("skips", 2 * per_rank, keyword=True)
    held = held_by(rank, schedule, 2, per_rank)
    stages = [pipe.build_stage(index, torch.device("cpu")) for index in held]
    pipeline = make_schedule(schedule, stages, 3, loss_fn)
    batch = traced.batch("skips", ROWS, 0)
    kwargs = {"attention_mask": batch.args[1]} if rank == giver else {}
    got = step(pipeline, stages, reference.Batch(batch.args[:1], batch.target, kwargs), "eval")
    expected = reference.evaluate([plain], batch, 3, loss_fn)
    return differences_of_step("eval", got, expected, last=2 * per_rank - 1 in held, exact=False)


@api.ours_only("brings inputs to the first stage only")
@pytest.mark.parametrize("giver", [0, 1])
@pytest.mark.parametrize("schedule", ["GPipe", "Interleaved1F1B"])
def test_keyword_inputs_go_in_at_the_first_rank_or_where_they_are_used(schedule: str, giver: int) -> None:
    assert ranks.run(_pass_by_keyword, 2, schedule=schedule, giver=giver) == [[], []]


def _look_at_pipe(rank: int) -> None:
    plain, pipe = traced.build("skips"), traced.trace("skips", 4)
    assert pipe.num_stages == 4
    names = [name for index in range(4) for name, _ in pipe.get_stage_module(index).named_parameters()]
    assert sorted(names) == sorted(name for name, _ in plain.named_parameters())


def test_a_pipe_knows_its_stages_and_keeps_parameter_names() -> None:
    ranks.run(_look_at_pipe, 1)


def _give_wrong_names(rank: int) -> str:
    stages = [traced.trace("skips", 2, keyword=True).build_stage(rank, torch.device("cpu"))]
    pipeline = make_schedule("GPipe", stages, 3, functools.partial(traced.loss_of, "skips"))
    batch = traced.batch("skips", ROWS, 0)
    kwargs = {"attention_msk": batch.args[1]} if rank == 0 else {}
    try:
        step(pipeline, stages, reference.Batch(batch.args[:1], batch.target, kwargs), "eval")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@api.ours_only("takes inputs by place")
def test_an_unknown_input_ends_the_step_on_every_rank() -> None:
    for said in ranks.run(_give_wrong_names, 2):
        assert "no input 'attention_msk'; its inputs are 'x', 'attention_mask'" in said


def _train_replicas(rank: int, kind: str, schedule: str) -> list[str]:
    """Two replicas of two ranks; says which gradients are not the mean of the replicas'."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    pipeline_rank, replica = divmod(rank, 2)
    per_rank = 1 if schedule == "1F1B" else 2
    plain, loss_fn = traced.build("skips"), functools.partial(traced.loss_of, "skips")
    pipe, group = traced.trace("skips", 2 * per_rank), mesh["pp"].get_group()
    stages = []
    for index in held_by(pipeline_rank, schedule, 2, per_rank):
        module = _replicated(pipe.get_stage_module(index), kind, mesh["dp"])
        stages.append(api.build_stage(module, index, pipe.info(), torch.device("cpu"), group))
    pipeline = make_schedule(schedule, stages, 3, loss_fn)
    batches = [traced.batch("skips", ROWS, number) for number in range(2)]
    step(pipeline, stages, batches[replica])
    total: dict[str, torch.Tensor] = {}
    for batch in batches:
        reference.train_step([plain], batch, loss_fn, 3)
        for name, parameter in plain.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad / 2
    found = []
    for stage in stages:
        for name, parameter in stage.submod.named_parameters():
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            found += reference.differences(name, grad, total[name.removeprefix("module.")], exact=False)
    return found


def _replicated(module: torch.nn.Module, kind: str, mesh: dist.DeviceMesh) -> torch.nn.Module:
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(module, process_group=mesh.get_group())
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=mesh, reshard_after_forward=False)


@api.ours_only("is shown by torch's own tests")
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_traced_stages_may_be_data_parallel(kind: str, schedule: str) -> None:
    assert ranks.run(_train_replicas, 4, kind=kind, schedule=schedule) == [[]] * 4


def _tied(rank: int, schedule: str) -> tuple[object, list[str]]:
    """What this rank's stages declare, and whether each place of it that is here is a parameter."""
    model = traced.build("gpt2")
    model.model.lm_head.weight = model.model.transformer.wte.weight
    split = {traced.SPLITS["gpt2"].format(index): api.SplitPoint.BEGINNING for index in (1, 2, 3)}
    pipe = api.pipeline(model, traced.batch("gpt2", 2, 0).args, split_spec=split)
    stages = [pipe.build_stage(index, torch.device("cpu")) for index in held_by(rank, schedule, 2, 2)]
    (declared,) = {stage.tied_parameters() for stage in stages}
    here = {stage.stage_index: dict(stage.submod.named_parameters()) for stage in stages}
    return declared, [name for places in declared for index, name in places if index in here and name in here[index]]


@api.ours_only("has no such declaration")
def test_traced_stages_declare_tied_parameters_alike_on_every_rank() -> None:
    embedding, head = "model.transformer.wte.weight", "model.lm_head.weight"
    declared = (((0, embedding), (3, head)),)
    assert ranks.run(_tied, 2, schedule="LoopedBFS") == [(declared, [embedding]), (declared, [head])]
    assert ranks.run(_tied, 2, schedule="DualPipeV") == [(declared, [embedding, head]), (declared, [])]
