"""Pipelines on the asynchronous device, its streams delayed at random: equal to the plain model, as on a CPU.

PP_ASYNC_DEVICE_SWEEP=n tries n seeds, every model and every number of stages; one seed and a choice of both otherwise.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pp_runtime import StepMetrics
from tests.async_device import device
from tests.helpers import api, device_cases, models, reference
from tests.helpers.failures import PROMPT, Met, meet
from tests.helpers.pipelines import (
    EVERY_SCHEDULE,
    LOOPED,
    MODELS,
    Setting,
    Twins,
    make_schedule,
    make_stages,
    stages_allowed,
    step,
)
from tests.running import test_step_failure
from tests.schedules import test_custom_functions, test_user_orders

pytestmark = [api.ours_only("is not what is tested here"), pytest.mark.timeout(300)]
SEEDS = int(os.environ.get("PP_ASYNC_DEVICE_SWEEP", "0"))
# torch has no convolution for a device that brings none, and the LSTM makes a view of a kernel of its own.
_NOT_ON_THE_DEVICE = {"norms", "recurrent"}
seeds = pytest.mark.parametrize("seed", range(1, 1 + max(SEEDS, 1)))


def _settings(count: int) -> list[Setting]:
    """Every schedule, with more microbatches than slots, so that slots are used again."""
    return [
        Setting(schedule, 2 * count + 1, stages)
        for schedule in EVERY_SCHEDULE
        for stages in (
            stages_allowed(schedule) if SEEDS else [2 if schedule in LOOPED else stages_allowed(schedule)[0]]
        )
    ]


def _train(rank: int, settings: list[Setting]) -> list[str]:
    """Two steps and an evaluation of each setting; what differs."""
    found = []
    for setting in settings:
        try:
            twins = Twins(rank, setting)
            for number in range(setting.steps):
                found += _named(
                    setting, twins.train(f"step {number}", twins.example.batch(2 * setting.microbatches, number))
                )
            if setting.model != "dropout":  # which draws other numbers each time
                found += _named(setting, twins.evaluate("evaluation", twins.example.batch(2 * setting.microbatches, 9)))
        except Exception:
            raise AssertionError(f"[{setting}] raised\n{traceback.format_exc()}") from None
    return found


def _named(setting: Setting, lines: list[str]) -> list[str]:
    return [f"[{setting}] {line}" for line in lines[:3]]


@seeds
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_schedule_equals_the_plain_model(count: int, seed: int) -> None:
    # Four ranks send without waiting for the receiver.
    options = {"seed": seed, "rendezvous": count < 4}
    assert device.run(_train, count, settings=_settings(count), **options) == [[]] * count


@seeds
def test_every_model_equals_the_plain_one(seed: int) -> None:
    names = sorted(set(MODELS if SEEDS else models.MODELS) - _NOT_ON_THE_DEVICE)
    settings = [
        Setting("1F1B" if place % 2 else "ZBVZeroBubble", 5, 1 + (place + 1) % 2, name)
        for place, name in enumerate(names)
    ]
    assert device.run(_train, 2, seed=seed, settings=settings) == [[], []]


@pytest.mark.parametrize("kind", ["direction", "shared"])
def test_fewer_communicators_serve_schedules_that_allow_it(kind: str) -> None:
    assert device.run(_train_over, 2, kind=kind) == [[], []]


def _train_over(rank: int, kind: str) -> list[str]:
    os.environ["PP_RUNTIME_COMMUNICATORS"] = kind
    return _train(rank, [Setting("GPipe", 5)])


def _keep(rank: int, schedules: list[str]) -> list[str]:
    found = []
    for schedule in schedules:
        stage = models.Keeps()
        stages = make_stages({rank: stage}, 2)
        pipeline = make_schedule(schedule, stages, 6, nn.functional.mse_loss)
        for number in range(3):
            step(pipeline, stages, models.rows_of_floats(12, number))
        kept = enumerate(stage.kept)
        found += [f"{schedule}: input {place} changed" for place, (one, copy) in kept if not torch.equal(one, copy)]
    return found


def test_received_tensors_that_are_kept_are_never_overwritten() -> None:
    assert device.run(_keep, 2, schedules=["GPipe", "1F1B", "ZB1P"]) == [[], []]


CYCLES, BUSY_S = 30_000_000, 0.02  # of one forward, about


def _metrics(rank: int) -> list[StepMetrics]:
    sim = torch.device("sim", 0)
    stage = api.PipelineStage(device_cases.Slow(CYCLES).to(sim), rank, 2, sim)
    schedule = make_schedule("1F1B", [stage], 3, nn.functional.mse_loss)
    rows = torch.randn(6, device_cases.WIDTH, device=sim)
    found = []
    for recorded in (False, False, True):
        schedule.record_timeline = recorded
        step(schedule, [stage], reference.Batch((rows,), rows))
        found.append(schedule.metrics())
    return found


def test_metrics_are_of_the_device_and_not_of_the_host_that_runs_ahead() -> None:
    for _, unrecorded, recorded in device.run(_metrics, 2):
        assert unrecorded.step_s >= 3 * BUSY_S > unrecorded.host_step_s - unrecorded.host_waiting_s
        assert unrecorded.compute_s is None and unrecorded.waiting_s is None
        assert 3 * BUSY_S <= recorded.compute_s <= recorded.step_s


def _train_with_users_functions(rank: int, schedules: list[str]) -> list[str]:
    kinds = ["F", "B", "I", "W", "OVERLAP_F_B"]
    return [line for name in schedules for line in test_custom_functions._train_with(rank, name, 2, kinds)]


def test_the_users_own_functions_equal_the_plain_model() -> None:
    schedules = ["Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"]
    assert device.run(_train_with_users_functions, 2, schedules=schedules) == [[], []]


def _train_with_orders(rank: int, files: list[tuple[str, list[int]]]) -> list[str]:
    return [line for path, owners in files for line in test_user_orders._train(rank, path, owners)]


def test_loaded_orders_equal_the_plain_model(tmp_path: Path) -> None:
    files = []
    for name, order in test_user_orders.ORDERS.items():
        rows, owners = order()
        files.append((test_user_orders._write(tmp_path / f"{name}.csv", rows), owners))
    assert device.run(_train_with_orders, 2, files=files) == [[], []]


def _train_with_ddp(rank: int, schedules: list[str]) -> list[str]:
    """Two replicas of two ranks; each stage's gradient is the mean of the replicas', reduced on a stream by DDP."""
    replica, place = divmod(rank, 2)
    data = [dist.new_group([first, first + 2]) for first in range(2)][place]
    pipe = [dist.new_group([first, first + 1]) for first in (0, 2)][replica]
    found = []
    for schedule in schedules:
        module = models.build(models.mlp, 2).stages[place].to(device.DEVICE)
        plain = models.build(models.mlp, 2)
        stages = make_stages({place: nn.parallel.DistributedDataParallel(module, process_group=data)}, 2, pipe)
        pipeline = make_schedule(schedule, stages, 5, plain.loss_fn)
        for number in range(2):
            module.zero_grad()
            batches = [plain.batch(10, 10 * number + one) for one in range(2)]
            step(pipeline, stages, batches[replica])
            gradients = []
            for batch in batches:
                reference.train_step(plain.stages, batch, plain.loss_fn, 5)
                gradients.append([parameter.grad for parameter in plain.stages[place].parameters()])
            for parameter, mine, other in zip(module.parameters(), *gradients, strict=True):
                expected = (mine + other) / 2
                found += reference.differences(f"{schedule} step {number}", parameter.grad, expected, exact=False)
    return found


def test_gradients_that_ddp_reduces_on_streams_are_the_mean_of_the_replicas() -> None:
    assert device.run(_train_with_ddp, 4, schedules=["1F1B", "ZB1P"]) == [[]] * 4


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_an_exception_in_a_stage_reaches_every_rank(way: str) -> None:
    arguments = {"schedule": "1F1B", "stages_per_rank": 1, "stage": 1, "way": way}
    facts = {"microbatch": test_step_failure.FAILING} if way == "forward" else {}
    found = device.run(test_step_failure._fail, test_step_failure.RANKS, **arguments)
    test_step_failure._check(found, 1, 1, f"boom in {way}", facts)


@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("1F1B", 1), ("ZBVZeroBubble", 2)])
def test_a_killed_rank_is_noticed_by_its_peers(schedule: str, stages_per_rank: int) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "stage": 1, "way": "death"}
    found = device.run(test_step_failure._fail, test_step_failure.RANKS, deaths=[1], **arguments)
    for rank in (0, 2):
        met, unchanged = found[rank]
        assert met is not None and met.seconds < PROMPT and unchanged, f"rank {rank}: {met}"
        assert met.is_a("PipelineError") and "rank 1" in met.text, f"rank {rank}: {met}"


class _DiesLater(nn.Module):
    """The last stage; its process is killed in the second microbatch of the second step, when its peer has long sent
    all that may be under way.
    """

    def __init__(self, microbatches: int) -> None:
        super().__init__()
        self.linear, self.left = nn.Linear(models.WIDTH, models.WIDTH), microbatches + 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.linear(x)


def _die_before_a_sender(rank: int, microbatches: int) -> Met | None:
    device.send_through_communicators()
    stages = make_stages({rank: _DiesLater(microbatches) if rank else nn.Linear(models.WIDTH, models.WIDTH)}, 2)
    pipeline = make_schedule("GPipe", stages, microbatches, nn.functional.mse_loss)
    step(pipeline, stages, models.rows_of_floats(2 * microbatches, 0))
    return meet(lambda: step(pipeline, stages, models.rows_of_floats(2 * microbatches, 1)))


def test_a_sender_that_waits_for_its_own_device_notices_a_killed_receiver() -> None:
    met, _ = device.run(_die_before_a_sender, 2, deaths=[1], microbatches=16)
    assert met is not None and met.seconds < PROMPT and met.is_a("PipelineError") and met.facts["rank"] == 1, met
    assert "to take 0SEND_F" in met.facts["waiting_for"], met


def _fail_on_a_stream(rank: int) -> Met | None:
    """The device of rank 1 fails in its second step, where the host learns of it late."""
    sim = device.load()
    twins = Twins(rank, Setting("1F1B", 5))
    twins.train("step 0", twins.example.batch(10, 0))
    if rank == 1:
        sim.queue_failure("an illegal memory access")

    def train_on() -> None:
        for number in range(1, 4):
            step(twins.schedule, twins.stages, twins.example.batch(10, number))
            sim.synchronize()

    return meet(train_on)


def test_a_device_that_fails_is_an_error_on_every_rank() -> None:
    for rank, met in enumerate(device.run(_fail_on_a_stream, 3)):
        assert met is not None and met.seconds < PROMPT, f"rank {rank}: {met}"
        assert "an illegal memory access" in met.text, f"rank {rank}: {met}"


def _train_without_communicators(rank: int) -> Met | None:
    """As with a backend that nobody has registered."""
    from pp_runtime.running import communicators

    device.send_through_communicators()
    del communicators._makers[device.BACKEND]
    twins = Twins(rank, Setting("1F1B", 5))
    return meet(lambda: twins.train("step 0", twins.example.batch(10, 0)))


def test_a_backend_that_is_not_registered_is_refused() -> None:
    for met in device.run(_train_without_communicators, 2):
        assert met is not None and met.is_a("PipelineUsageError")
        assert "backend 'simccl'" in met.text and "register_communicator" in met.text
