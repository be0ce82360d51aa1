"""On GPUs: training equals the plain model's, kept inputs stay, and the host runs ahead of the device.

Ranks of a host share its GPUs, through device channels; what needs a communicator of two ranks needs a GPU for each.
``python -m benchmarks.gpu`` runs the same without pytest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import api, device_cases, ranks
from tests.helpers.pipelines import EVERY_SCHEDULE, stages_allowed

pytestmark = [pytest.mark.cuda, api.ours_only("is not what is tested here")]
one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
shared = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 2 GPUs, or device channels on one")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _trained(count: int, schedule: str, **options: Any) -> list[list[str]]:
    options |= {"backend": device_cases.BACKENDS["cuda"], "count": count, "schedule": schedule, "kind": "cuda"}
    return ranks.run(device_cases.train, count, timeout=120, **options)


@one_gpu
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_stages_of_one_gpu_equal_the_plain_model(schedule: str) -> None:
    assert _trained(1, schedule, stages_per_rank=2) == [[]]


@shared
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("cycles", [0, 2_000_000])
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_device_channels_equal_the_plain_model(schedule: str, cycles: int, count: int) -> None:
    options: dict[str, Any] = {"stages_per_rank": stages_allowed(schedule)[-1], "cycles": cycles}
    assert _trained(count, schedule, transport="device", **options) == [[]] * count


@two_gpus
@pytest.mark.parametrize("communicators", ["pair", "direction", "edge", "shared"])
def test_communicators_equal_the_plain_model(communicators: str) -> None:
    assert _trained(2, "GPipe", transport="c10d", communicators=communicators) == [[], []]


@two_gpus
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_every_schedule_over_communicators_equals_the_plain_model(schedule: str) -> None:
    options: dict[str, Any] = {"stages_per_rank": stages_allowed(schedule)[-1], "cycles": 2_000_000}
    assert _trained(2, schedule, transport="c10d", **options) == [[], []]


@shared
def test_the_host_does_not_wait_for_the_device_and_the_timeline_is_the_devices() -> None:
    options: dict[str, Any] = {"backend": device_cases.BACKENDS["cuda"], "kind": "cuda"}
    for measured in ranks.run(device_cases.run_ahead, 2, timeout=120, **options):
        assert device_cases.not_ahead(*measured) == []
