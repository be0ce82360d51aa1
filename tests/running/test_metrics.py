"""What a step's metrics say: times that agree with the timeline, bytes to the last one, waits where they are."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pp_runtime import PipelineMetrics, PipelineUsageError, StepMetrics
from pp_runtime.errors import PipelineModeError, PipelineTypeError
from pp_runtime.running.lanes import recorded_lanes
from pp_runtime.timing import Timeline
from tests.helpers import api, ranks
from tests.helpers.models import WIDTH
from tests.helpers.pipelines import Setting, Twins, make_schedule, make_stages
from tests.schedules.test_custom_functions import backward, forward

pytestmark = api.ours_only("has no metrics")

SCHEDULES = [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("DualPipeV", 2)]
TRANSPORTS = ["shared_memory", "c10d"]
EXACTLY = 1e-9  # what adding floating-point seconds in another order may lose
_mse = nn.functional.mse_loss


def disagreements(metrics: StepMetrics, timeline: Timeline) -> list[str]:
    """Where times are not those of the same step's timeline, which knows nothing of what is between its spans."""
    rank, step_s, compute_s, waiting_s = metrics.rank, metrics.step_s, metrics.compute_s, metrics.waiting_s
    assert compute_s is not None and waiting_s is not None
    between = timeline.makespan - sum(span.end - span.start for span in timeline.of_rank(rank))
    after = step_s - timeline.makespan
    bounds = {
        "compute": (timeline.busy(rank), compute_s, timeline.busy(rank) + between),
        "waiting": (timeline.waiting(rank), waiting_s, timeline.waiting(rank) + after),
        "both": (0.0, compute_s + waiting_s, step_s),
        "step": (timeline.makespan, step_s, float("inf")),
    }
    return [f"{name}: {b}" for name, b in bounds.items() if not b[0] - EXACTLY <= b[1] <= b[2] + EXACTLY]


def _compare_with_timeline(rank: int, schedule: str, stages_per_rank: int, custom: bool, transport: str) -> list[str]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    twins = Twins(rank, Setting(schedule, 4, stages_per_rank))
    if custom:
        twins.schedule.register_custom_function(api.schedules.FORWARD, forward)
        twins.schedule.register_custom_function(api.schedules.FULL_BACKWARD, backward)
    twins.schedule.record_timeline = True
    found = []
    for number in range(3):
        found += twins.train(f"step {number}", twins.example.batch(8, number))
        metrics = twins.schedule.metrics()
        found += [f"step {number}, {each}" for each in disagreements(metrics, twins.schedule.timeline())]
        assert twins.schedule.metrics() == metrics and metrics.compute_s > 0 and metrics.training
        assert (metrics.host_step_s, metrics.host_waiting_s) == (metrics.step_s, metrics.waiting_s)
    return found


@pytest.mark.parametrize(("schedule", "stages_per_rank"), SCHEDULES)
def test_compute_and_waiting_are_those_of_the_same_steps_timeline(schedule: str, stages_per_rank: int) -> None:
    setting = {"schedule": schedule, "stages_per_rank": stages_per_rank, "custom": False}
    assert ranks.run(_compare_with_timeline, 2, transport="shared_memory", **setting) == [[], []]


def test_compute_and_waiting_are_those_of_the_timeline_over_c10d_too() -> None:
    setting = {"schedule": "1F1B", "stages_per_rank": 1, "custom": False}
    assert ranks.run(_compare_with_timeline, 2, transport="c10d", **setting) == [[], []]


def test_functions_that_stand_for_compute_are_compute() -> None:
    setting = {"schedule": "Interleaved1F1B", "stages_per_rank": 2, "custom": True}
    assert ranks.run(_compare_with_timeline, 2, transport="shared_memory", **setting) == [[], []]


class WithMask(nn.Module):
    """Gives a tensor that has a gradient and one that has none, of different sizes an element."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), torch.ones(len(x), 3, dtype=torch.int64)


class UsesMask(nn.Module):
    """The stage after it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.linear(x) * mask.sum(1, keepdim=True)


def _bytes(rank: int, transport: str) -> list[tuple[int, int]]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    module = (WithMask(), UsesMask())[rank]
    schedule = make_schedule("1F1B", make_stages({rank: module}, 2), 3, _mse)
    found = []
    for run, rows in ((schedule.step, 10), (schedule.eval, 10), (schedule.step, 6)):
        run(*((torch.randn(rows, WIDTH),) if rank == 0 else ()), target=torch.randn(rows, WIDTH) if rank else None)
        metrics = schedule.metrics()
        assert metrics.training == (run == schedule.step)
        found.append((metrics.sent_bytes, metrics.received_bytes))
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bytes_are_those_of_the_tensors_that_travel(transport: str) -> None:
    activations, gradients = 4 * WIDTH + 8 * 3, 4 * WIDTH  # a row
    first, second = ranks.run(_bytes, 2, transport=transport)
    assert first == [(10 * activations, 10 * gradients), (10 * activations, 0), (6 * activations, 6 * gradients)]
    assert second == [(received, sent) for sent, received in first]


def _bytes_of_a_v(rank: int) -> tuple[int, int]:
    twins = Twins(rank, Setting("ZBVZeroBubble", 3, 2))
    twins.train("step", twins.example.batch(6, 0))
    metrics = twins.schedule.metrics()
    return metrics.sent_bytes, metrics.received_bytes


def test_what_stages_of_one_rank_hand_over_is_not_sent() -> None:
    edge = 6 * WIDTH * 4  # of the whole batch
    assert ranks.run(_bytes_of_a_v, 2) == [(2 * edge, 2 * edge)] * 2


PAUSE = 0.02


class Slow(nn.Module):
    """A stage whose forward takes at least ``PAUSE``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return self.linear(x)


def _beside_slow(rank: int, slow: int, transport: str) -> StepMetrics:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    module = Slow() if rank == slow else nn.Linear(WIDTH, WIDTH)
    schedule = make_schedule("1F1B", make_stages({rank: module}, 2), 4, _mse)
    for _ in range(2):  # what only a first step does is not waiting
        schedule.step(*((torch.randn(8, WIDTH),) if rank == 0 else ()), target=torch.randn(8, WIDTH) if rank else None)
    return schedule.metrics()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_stage_is_its_neighbours_waiting(slow: int, transport: str) -> None:
    found = ranks.run(_beside_slow, 2, slow=slow, transport=transport)
    assert found[slow].compute_s >= 4 * PAUSE
    # Of the four, one may be over before the neighbour has something to wait for.
    assert found[1 - slow].waiting_s >= 2 * PAUSE
    assert found[1 - slow].bubble > 0.5 > found[slow].bubble


def _gather(rank: int) -> tuple[StepMetrics, PipelineMetrics | None, PipelineMetrics | None]:
    twins = Twins(rank, Setting("1F1B", 4))
    twins.train("step", twins.example.batch(8, 0))
    metrics = twins.schedule.metrics(tokens=8, flops=1e6, peak_flops=1e9)
    alone = dist.new_group([1])
    return metrics, metrics.gather(), metrics.gather(alone) if rank == 1 else None


def test_metrics_are_gathered_on_the_first_rank_of_a_group() -> None:
    (first, gathered, _), (second, nothing, alone) = ranks.run(_gather, 2)
    assert nothing is None and gathered == PipelineMetrics((first, second)) and alone == PipelineMetrics((second,))
    assert [row.rank for row in gathered.ranks] == [0, 1]


def _throughput(rank: int) -> StepMetrics:
    twins = Twins(rank, Setting("1F1B", 4))
    twins.train("step", twins.example.batch(8, 0))
    assert twins.schedule.metrics().tokens_per_s is None
    return twins.schedule.metrics(tokens=800, flops=3e6, peak_flops=2e9)


def test_tokens_and_flops_are_divided_by_the_step_and_by_what_all_devices_are_capable_of() -> None:
    for metrics in ranks.run(_throughput, 2):
        assert metrics.tokens_per_s == pytest.approx(800 / metrics.step_s)
        assert metrics.flops_per_s == pytest.approx(3e6 / metrics.step_s)
        assert metrics.mfu == pytest.approx(3e6 / metrics.step_s / (2 * 2e9))


def _on_lanes(rank: int) -> tuple[StepMetrics, StepMetrics, Timeline]:
    with recorded_lanes():
        twins = Twins(rank, Setting("1F1B", 4))
        twins.train("step", twins.example.batch(8, 0))
        unrecorded = twins.schedule.metrics()
        twins.schedule.record_timeline = True
        twins.train("step", twins.example.batch(8, 1))
        return unrecorded, twins.schedule.metrics(), twins.schedule.timeline()


def test_an_accelerators_times_are_its_own_and_unknown_without_a_timeline() -> None:
    for rank, (unrecorded, recorded, timeline) in enumerate(ranks.run(_on_lanes, 2)):
        assert (unrecorded.compute_s, unrecorded.waiting_s, unrecorded.bubble) == (None, None, None)
        # This device's clock is the host's, which stops for it later.
        assert 0 < unrecorded.step_s < unrecorded.host_step_s and unrecorded.host_waiting_s > 0
        assert recorded.compute_s == timeline.busy(rank) > 0 and recorded.waiting_s == timeline.waiting(rank)
        assert timeline.makespan <= recorded.step_s
        assert unrecorded.sent_bytes == recorded.sent_bytes == 8 * WIDTH * 4


METRICS = StepMetrics(
    rank=1,
    training=True,
    step_s=0.0125,
    compute_s=0.01,
    waiting_s=0.002,
    host_step_s=0.0125,
    host_waiting_s=0.002,
    sent_bytes=1_230_000,
    received_bytes=0,
    tokens_per_s=83_000.0,
    flops_per_s=4.5e12,
    mfu=0.412,
)
UNTOLD = dataclasses.replace(METRICS, tokens_per_s=None, flops_per_s=None, mfu=None)
ON_DEVICE = dataclasses.replace(UNTOLD, compute_s=None, waiting_s=None, host_step_s=1.5)
FASTER = dataclasses.replace(METRICS, rank=0, step_s=0.0115, compute_s=0.006, waiting_s=0.005, sent_bytes=0)


def test_a_line_has_what_is_known() -> None:
    assert METRICS.line() == (
        "rank 1: step 12.5 ms, compute 10 ms, waiting 2 ms, bubble 20%, sent 1.23 MB, received 0 B, "
        "83,000 tokens/s, 4.5 TFLOP/s, MFU 41.2%"
    )
    assert UNTOLD.line() == (
        "rank 1: step 12.5 ms, compute 10 ms, waiting 2 ms, bubble 20%, sent 1.23 MB, received 0 B"
    )
    assert ON_DEVICE.line() == "rank 1: step 12.5 ms, host 1.5 s of which waiting 2 ms, sent 1.23 MB, received 0 B"


def test_a_dict_has_a_number_for_each_that_is_known() -> None:
    values = METRICS.as_dict("train/")
    assert values["train/step_s"] == 0.0125 and values["train/bubble"] == pytest.approx(0.2)
    assert values["train/sent_bytes"] == 1_230_000.0 and values["train/mfu"] == 0.412
    assert all(type(value) is float for value in values.values()) and len(values) == 11
    assert set(UNTOLD.as_dict()) == {name.removeprefix("train/") for name in values} - {
        "tokens_per_s",
        "flops_per_s",
        "mfu",
    }
    assert not {"compute_s", "waiting_s", "bubble"} & set(ON_DEVICE.as_dict())


def test_all_ranks_have_maxima_means_and_a_bubble_of_their_own() -> None:
    both = PipelineMetrics((FASTER, METRICS))
    assert both.step_s == both.maxima()["step_s"] == 0.0125
    assert both.means()["compute_s"] == pytest.approx(0.008)
    assert both.bubble == pytest.approx(1 - 0.016 / 0.025)
    assert both.as_dict("pp/")["pp/waiting_s_max"] == 0.005 and len(both.as_dict()) == 22
    assert both.line() == (
        "2 ranks: step 12.5 ms, compute 8 ms (at most 10 ms, rank 1), waiting 3.5 ms (at most 5 ms, rank 0), "
        "bubble 36%, sent 1.23 MB, 83,000 tokens/s, 4.5 TFLOP/s, MFU 41.2%"
    )
    partly = PipelineMetrics((METRICS, ON_DEVICE))
    assert partly.bubble is None and "compute_s" not in partly.means()
    assert partly.line() == "2 ranks: step 12.5 ms, host 756 ms (at most 1.5 s, rank 1), sent 2.46 MB"


class Writer:
    """What of TensorBoard's writer is used."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


@pytest.mark.parametrize("metrics", [METRICS, PipelineMetrics((METRICS, FASTER))])
def test_every_number_goes_to_tensorboard(metrics: Any) -> None:
    writer = Writer()
    metrics.to_tensorboard(writer, 7)
    assert writer.scalars == [(name, value, 7) for name, value in metrics.as_dict("pipeline/").items()]


def _fail(rank: int) -> str:
    module: Any = nn.Linear(WIDTH, WIDTH)
    schedule = make_schedule("1F1B", make_stages({rank: module}, 2), 2, _mse)

    def step() -> None:
        schedule.step(*((torch.randn(4, WIDTH),) if rank == 0 else ()), target=torch.randn(4, WIDTH) if rank else None)

    with pytest.raises(PipelineModeError, match=r"before the first step: call step\(\) or eval\(\)"):
        schedule.metrics()
    step()
    schedule.metrics()
    handle = module.register_forward_hook(lambda *_: 1 / 0) if rank == 1 else None
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        step()
    with pytest.raises(PipelineModeError, match=r"the last step failed.*call metrics\(\) after a step that ended"):
        schedule.metrics()
    if handle is not None:
        handle.remove()
    step()
    return schedule.metrics().line()


def test_there_are_no_metrics_before_a_step_or_of_one_that_failed() -> None:
    first, second = ranks.run(_fail, 2)
    assert first.startswith("rank 0: step ") and second.startswith("rank 1: step ")


def _refuse(rank: int) -> None:
    twins = Twins(rank, Setting("GPipe", 2))
    twins.train("step", twins.example.batch(4, 0))
    with pytest.raises(PipelineUsageError, match="tokens is 0: give the tokens of the whole batch, more than 0"):
        twins.schedule.metrics(tokens=0)
    with pytest.raises(PipelineTypeError, match="flops must be a number, got str: give the floating-point operations"):
        twins.schedule.metrics(flops="1e12")
    with pytest.raises(PipelineUsageError, match="peak_flops was given without flops.*6 \\* parameters \\* tokens"):
        twins.schedule.metrics(peak_flops=1e12)


def test_what_cannot_be_the_work_of_a_step_is_refused() -> None:
    ranks.run(_refuse, 1)
