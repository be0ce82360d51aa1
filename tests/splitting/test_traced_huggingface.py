"""Hugging Face models split by the tracer train as they do whole, their inputs given by name."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist

from tests.helpers import api, ranks, reference
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    ONE_STAGE,
    backward_orders,
    differences_of_step,
    held_by,
    make_schedule,
)
from tests.helpers.traced_huggingface import MODELS, ROWS, batch, build, loss_of, trace

WARM = "tests.helpers.traced_huggingface"
MICROBATCHES = 4
FEW = ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"]

pytestmark = api.ours_only("loses values between modules, and binds inputs by place")


def _train(rank: int, name: str, schedules: list[str]) -> list[str]:
    """Train the stages and the plain model for a step under each schedule; say what of this rank's differs."""
    return [line for schedule in schedules for line in _train_one(rank, name, schedule)]


def _train_one(rank: int, name: str, schedule: str) -> list[str]:
    per_rank = 1 if schedule in ONE_STAGE else 2
    num_stages = per_rank * dist.get_world_size()
    held = held_by(rank, schedule, dist.get_world_size(), per_rank)
    pipe, plain = trace(name, num_stages), build(name)
    stages = [pipe.build_stage(index, torch.device("cpu")) for index in held]
    for stage in stages:
        stage.submod.zero_grad()
    pipeline = make_schedule(schedule, stages, MICROBATCHES, loss_of)
    whole, last, losses = batch(name, ROWS * MICROBATCHES, 1), num_stages - 1 in held, []
    # Inputs go in where the first stage is; giving them everywhere must not matter.
    inputs = dict(whole.kwargs or {}) if 0 in held or schedule == "Interleaved1F1B" else {}
    output = pipeline.step(**inputs, **({"target": whole.target, "losses": losses} if last else {}))
    expected = reference.train_step([plain], whole, loss_of, MICROBATCHES)
    found = differences_of_step(schedule, reference.Outcome(output, losses), expected, last=last, exact=True)
    ascending, orders = list(range(MICROBATCHES)), backward_orders(pipeline)
    for stage in stages:
        exact = MODELS[name].exact and orders.get(stage.stage_index, ascending) == ascending
        for key, parameter in stage.submod.named_parameters():
            wanted = plain.get_parameter(key).grad
            found += reference.differences(f"{schedule} {key}.grad", parameter.grad, wanted, exact)
    return found


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_models_split_at_layers_train_as_they_do_whole(name: str) -> None:
    assert ranks.run(_train, 2, name=name, schedules=FEW) == [[], []]


def test_llama_trains_as_it_does_whole_in_every_schedule() -> None:
    assert ranks.run(_train, 2, name="llama", schedules=EVERY_SCHEDULE) == [[], []]


TIED = {
    "gpt2": ["transformer.wte", "lm_head"],
    "llama": ["model.embed_tokens", "lm_head"],
    "qwen2": ["model.embed_tokens", "lm_head"],
    "mixtral": ["model.embed_tokens", "lm_head"],
    "bert": ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
    "t5": ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
    "vit": [],
}


@pytest.mark.parametrize("name", MODELS)
def test_models_split_before_and_after_every_layer_compute_what_they_do_whole(name: str) -> None:
    """Run stage by stage in this process, weights tied where the model has them so."""
    plain, inputs = build(name, tied=True), dict(batch(name, ROWS, 0).kwargs or {})
    layers = MODELS[name].layers
    split = dict.fromkeys(layers, api.SplitPoint.BEGINNING)
    pipe = api.pipeline(build(name, tied=True), (), inputs, split_spec=split)
    assert pipe.num_stages == len(layers) + 1
    (output,), expected = pipe(**inputs), plain(**inputs)
    assert torch.equal(output, expected)
    by_place = [inputs[key] for key in inspect.signature(plain.forward).parameters]
    assert torch.equal(pipe(*by_place)[0], expected)
    modules = [pipe.get_stage_module(index) for index in range(pipe.num_stages)]
    output.square().sum().backward()
    expected.square().sum().backward()
    tied = [[f"model.{module}.weight" for module in TIED[name]]] if TIED[name] else []
    assert [[key for _, key in places] for places in pipe.info().tied_parameters] == tied
    for places in pipe.info().tied_parameters:
        total = sum(modules[stage].get_parameter(key).grad for stage, key in places)
        torch.testing.assert_close(total, plain.get_parameter(places[0][1]).grad, rtol=1e-5, atol=1e-6)
    shared = {place for places in pipe.info().tied_parameters for place in places}
    for stage, module in enumerate(modules):
        for key, parameter in module.named_parameters():
            if (stage, key) not in shared:
                torch.testing.assert_close(parameter.grad, plain.get_parameter(key).grad, rtol=1e-5, atol=1e-6)
    used = {parameter for parameter in plain.parameters() if parameter.grad is not None}
    assert used == {plain.get_parameter(key) for module in modules for key, _ in module.named_parameters()}
