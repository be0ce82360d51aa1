"""A step does what it must once, and leaves nothing behind that its user does not hold."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.helpers import api, ranks
from tests.helpers.models import WIDTH, rows_of_floats
from tests.helpers.pipelines import held_by, make_schedule, make_stages, step

SCHEDULES = [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2)]
every_kind = pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)

RANKS, MICROBATCHES = 2, 6


class Watched(nn.Module):
    """Counts what happens to it and keeps weak references to all that passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.forwards = self.input_hooks = self.output_hooks = self.parameter_hooks = 0
        self.seen = list[weakref.ref]()
        self.linear.weight.register_post_accumulate_grad_hook(self._on_parameter)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        hidden = self.linear(x)
        y = torch.tanh(self.norm(hidden))
        if torch.is_grad_enabled():
            if x.requires_grad:
                x.register_hook(self._on_input)
            y.register_hook(self._on_output)
        self.seen += [weakref.ref(tensor) for tensor in (x, hidden, y)]
        return y

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.seen)

    def _on_input(self, gradient: Tensor) -> None:
        self.input_hooks += 1
        self.seen.append(weakref.ref(gradient))

    def _on_output(self, gradient: Tensor) -> None:
        self.output_hooks += 1
        self.seen.append(weakref.ref(gradient))

    def _on_parameter(self, parameter: Tensor) -> None:
        self.parameter_hooks += 1


class Pipeline:
    """This rank's watched stages and their schedule."""

    def __init__(self, rank: int, schedule: str, stages_per_rank: int, module: type[nn.Module] = Watched) -> None:
        torch.manual_seed(rank)
        held = held_by(rank, schedule, RANKS, stages_per_rank)
        self.modules = {index: module() for index in held}
        self.stages = make_stages(self.modules, RANKS * stages_per_rank)
        self.schedule = make_schedule(schedule, self.stages, MICROBATCHES, nn.functional.mse_loss)

    def step(self, number: int = 0, method: str = "step", rows: int = 2 * MICROBATCHES, **options: Any) -> Any:
        return step(self.schedule, self.stages, rows_of_floats(rows, number), method, **options)


def _count_hooks(rank: int, schedule: str, stages_per_rank: int) -> None:
    pipeline = Pipeline(rank, schedule, stages_per_rank)
    for number in range(1, 4):
        pipeline.step(number)
        for index, module in pipeline.modules.items():
            expected = number * MICROBATCHES
            assert module.output_hooks == expected, f"step {number}, stage {index}, output: {module.output_hooks}"
            assert module.input_hooks == (expected if index else 0), f"step {number}, stage {index}, input"
            assert module.parameter_hooks == expected, f"step {number}, stage {index}, weight"


@api.ours_only("hooks pile up on its buffers and split backward skips those of parameters")
@every_kind
def test_hooks_fire_once_a_microbatch_in_every_step(schedule: str, stages_per_rank: int) -> None:
    ranks.run(_count_hooks, RANKS, schedule=schedule, stages_per_rank=stages_per_rank)


def _count_forwards(rank: int, schedule: str, stages_per_rank: int) -> None:
    pipeline = Pipeline(rank, schedule, stages_per_rank)
    seen = 0
    for number, method in enumerate(["step", "eval", "step"]):
        random = torch.get_rng_state()
        pipeline.step(number, method)
        assert torch.equal(random, torch.get_rng_state()), f"{method} {number} drew random numbers"
        seen += MICROBATCHES
        for index, module in pipeline.modules.items():
            assert module.forwards == seen, f"{method} {number}, stage {index}: {module.forwards} forwards"
            assert module.norm.num_batches_tracked == seen, f"{method} {number}, stage {index}: batch norm"


@api.ours_only("runs a hidden forward at the first step and at every change to evaluation")
@every_kind
def test_each_microbatch_goes_forward_once_and_batch_norm_counts_it_once(schedule: str, stages_per_rank: int) -> None:
    ranks.run(_count_forwards, RANKS, schedule=schedule, stages_per_rank=stages_per_rank)


def _leave_nothing(rank: int, schedule: str, stages_per_rank: int) -> None:
    gc.collect()
    gc.disable()  # a tensor that only the collector frees lives as long as it pleases
    pipeline = Pipeline(rank, schedule, stages_per_rank)
    for number, method in enumerate(["step", "step", "eval", "step"]):
        outcome = pipeline.step(number, method)
        if rank == 0 and outcome.outputs is not None:
            assert outcome.outputs.shape == (2 * MICROBATCHES, WIDTH)
        del outcome
        for index, module in pipeline.modules.items():
            held = module.alive()
            assert not held, f"{method} {number}, stage {index}: {held} of {len(module.seen)} tensors live on"


@api.ours_only("keeps buffers and outputs")
@every_kind
def test_no_tensor_of_a_step_outlives_it(schedule: str, stages_per_rank: int) -> None:
    ranks.run(_leave_nothing, RANKS, schedule=schedule, stages_per_rank=stages_per_rank)


def _forget_the_pipeline(rank: int, schedule: str, stages_per_rank: int) -> None:
    pipeline = Pipeline(rank, schedule, stages_per_rank, Plain)
    pipeline.step()
    modules = [weakref.ref(module) for module in pipeline.modules.values()]
    del pipeline
    gc.collect()
    assert not any(module() is not None for module in modules)


@api.ours_only("keeps them")
@every_kind
def test_a_dropped_schedule_frees_its_stages(schedule: str, stages_per_rank: int) -> None:
    ranks.run(_forget_the_pipeline, RANKS, schedule=schedule, stages_per_rank=stages_per_rank)


def _hold_no_graph(rank: int, schedule: str, stages_per_rank: int) -> int:
    pipeline = Pipeline(rank, schedule, stages_per_rank)
    outcome = pipeline.step()
    results = outcome.losses + ([] if outcome.outputs is None else [outcome.outputs])
    assert not any(result.requires_grad or result.grad_fn for result in results)
    return len(results)


@api.ours_only("returns losses and outputs with their graph")
@every_kind
def test_losses_and_outputs_hold_no_graph(schedule: str, stages_per_rank: int) -> None:
    counts = ranks.run(_hold_no_graph, RANKS, schedule=schedule, stages_per_rank=stages_per_rank)
    assert sorted(counts) == [0, MICROBATCHES + 1]


class Keeper(nn.Module):
    """A stage that keeps its inputs, as a user's cache would."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(WIDTH, WIDTH), list[tuple[Tensor, Tensor]]()

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append((x.detach(), x.detach().clone()))
        return self.linear(x)


def _keep_everything(rank: int, schedule: str, stages_per_rank: int) -> None:
    pipeline = Pipeline(rank, schedule, stages_per_rank, Keeper)
    results = []
    for number in range(4):
        outcome = pipeline.step(number, "eval" if number == 2 else "step")
        results += [(result, result.clone()) for result in outcome.losses]
        results += [] if outcome.outputs is None else [(outcome.outputs, outcome.outputs.clone())]
    assert all(torch.equal(value, copy) for value, copy in results), "a later step wrote over a result"
    for index, module in pipeline.modules.items():
        changed = sum(not torch.equal(value, copy) for value, copy in module.kept)
        assert not changed, f"stage {index}: {changed} of {len(module.kept)} kept inputs were written over"


@api.ours_only("writes every step into the same buffers")
@every_kind
def test_what_the_user_keeps_is_never_written_over(schedule: str, stages_per_rank: int) -> None:
    ranks.run(_keep_everything, RANKS, schedule=schedule, stages_per_rank=stages_per_rank)


class Plain(nn.Module):
    """A linear layer, whose output autograd does not need; it counts how many inputs and outputs have storage left."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.inputs, self.outputs = list[StorageWeakRef](), list[StorageWeakRef]()
        self.most_inputs = self.most_outputs = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.most_inputs = max(self.most_inputs, _distinct(self.inputs))
        self.most_outputs = max(self.most_outputs, _distinct(self.outputs))
        self.inputs.append(StorageWeakRef(x.untyped_storage()))
        self.outputs.append(StorageWeakRef(y.untyped_storage()))
        return y


def _distinct(storages: list[StorageWeakRef]) -> int:
    return len({storage.cdata for storage in storages if not storage.expired()})


def _most_alive(rank: int, microbatches: int) -> tuple[int, int]:
    module = Plain()
    stages = make_stages({rank: module}, RANKS)
    schedule = make_schedule("1F1B", stages, microbatches, nn.functional.mse_loss)
    for number in range(2):
        step(schedule, stages, rows_of_floats(microbatches, number), return_outputs=False)
    return (module.most_inputs if rank else 0), module.most_outputs


@api.ours_only("keeps a buffer a microbatch, and every sent output until the step ends")
def test_memory_does_not_grow_with_the_number_of_microbatches() -> None:
    short, long = (ranks.run(_most_alive, RANKS, microbatches=count) for count in (8, 40))
    for rank in range(RANKS):
        for few, many in zip(short[rank], long[rank], strict=True):
            assert many <= few + 1, f"inputs and outputs alive: {short} with 8 microbatches, {long} with 40"
            assert many <= RANKS + 2, f"inputs and outputs alive: {long}"


def _make_on_one_rank_only(rank: int, schedule: str) -> None:
    if rank == 0:
        Pipeline(rank, schedule, 1 if schedule in ("GPipe", "1F1B") else 2)


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_a_schedule_is_made_without_its_peers(schedule: str) -> None:
    ranks.run(_make_on_one_rank_only, RANKS, schedule=schedule, timeout=20)
