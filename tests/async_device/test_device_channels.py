"""Channels between devices of one host, through memory that both map: equal to the plain model, and never stuck."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.async_device import device
from tests.helpers import api
from tests.helpers.failures import PROMPT, Met, meet
from tests.helpers.models import WIDTH, rows_of_floats
from tests.helpers.pipelines import Setting, Twins, make_schedule, make_stages, step

pytestmark = api.ours_only("has no channels of its own")


def _kinds(twins: Twins) -> set[str]:
    channels = twins.schedule._runtime._channels
    return {type(end).__name__ for end in (*channels.senders.values(), *channels.receivers.values())}


def _grow(rank: int, transport: str) -> tuple[set[str], list[str]]:
    """Batches grow and shrink, so that slots are outgrown while messages are under way; what differs from the plain."""
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    twins = Twins(rank, Setting("1F1B", 5))
    found = []
    for number, rows in enumerate((5, 40, 10, 200, 15, 200)):
        found += twins.train(f"step {number}", twins.example.batch(rows, number))
        found += twins.evaluate(f"evaluation {number}", twins.example.batch(2 * rows, 10 + number))
    return _kinds(twins), found


@pytest.mark.parametrize("transport", ["auto", "device", "c10d"])
def test_messages_of_all_sizes_arrive_whole(transport: str) -> None:
    channel = "Communicator" if transport == "c10d" else "Device"
    ends = [f"{channel}SendChannel", f"{channel}ReceiveChannel"]
    assert device.run(_grow, 2, transport=transport) == [(set(ends), [])] * 2


def _leave_awaits_out(rank: int) -> list[tuple[bool, bool]]:
    """Leaves each wait of rank 1 for a number of rank 0's out once, where rank 0's device is slow.

    For each, whether it was for a message's arrival (or for a slot to send in), and whether numbers were wrong.
    """
    sim = device.load()
    tried = []
    for number in range(12):
        twins = Twins(rank, Setting("1F1B", 5))
        twins.train("to open the channels", twins.example.batch(10, 0))
        sim.synchronize()
        dist.barrier()
        sim.leave_out_await(number if rank == 1 else -1)
        sim.set_slow_stream(0 if rank == 0 else -1, 2000)
        found = twins.train("without a wait", twins.example.batch(10, number))
        sim.synchronize()
        sim.set_slow_stream(-1, 0)
        asked = sim.leave_out_await(-1)
        told: list[Any] = [None, None]
        dist.all_gather_object(told, bool(found))
        if len(asked) > number:
            tried.append((asked[number] == asked[0], any(told)))  # it receives before it sends
    return tried


def test_a_wait_for_a_peers_message_that_is_left_out_gives_wrong_numbers() -> None:
    """The waits for a slot are covered by the flow of data: what is sent comes of what the slot's last reader made."""
    _, tried = device.run(_leave_awaits_out, 2)
    arrivals = [wrong for is_arrival, wrong in tried if is_arrival]
    assert len(arrivals) >= 4 and all(arrivals), tried


class Dies(nn.Module):
    """The last stage. In the second step its device is far behind the host, which is killed when all is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 5:
            device.load().queue_sleep(60_000_000)
        return self.linear(x)


def _die_with_work_queued(rank: int) -> tuple[Met | None, float]:
    sim = device.load()
    stages = make_stages({rank: Dies() if rank else nn.Linear(WIDTH, WIDTH)}, 2)
    pipeline = make_schedule("1F1B", stages, 4, nn.functional.mse_loss)
    step(pipeline, stages, rows_of_floats(8, 0))
    if rank == 1:
        stages[0].submod.register_full_backward_hook(_kill_at_the_last)
    met = meet(lambda: step(pipeline, stages, rows_of_floats(8, 1)))
    since = time.monotonic()
    sim.synchronize()  # no stream waits for the dead
    return met, time.monotonic() - since


def _kill_at_the_last(module: Any, *_: Any) -> None:
    module.backwards = getattr(module, "backwards", 0) + 1
    if module.backwards == 4:
        os.kill(os.getpid(), signal.SIGKILL)


def test_no_stream_waits_for_a_rank_that_was_killed_with_its_work_queued() -> None:
    (met, seconds), _ = device.run(_die_with_work_queued, 2, deaths=[1], delay_us=0)
    assert met is not None and met.is_a("PipelineError") and met.facts["rank"] == 1 and met.seconds < PROMPT, met
    assert seconds < 5, seconds


def _ask_for(rank: int, transport: str) -> str:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    twins = Twins(rank, Setting("1F1B", 2))
    met = meet(lambda: step(twins.schedule, twins.stages, twins.example.batch(4, 0)))
    return "" if met is None else met.text


def test_a_transport_that_is_not_for_the_device_is_refused_in_a_sentence() -> None:
    for text in device.run(_ask_for, 2, transport="shared_memory"):
        assert re.search(r"PP_RUNTIME_TRANSPORT=shared_memory is not for stages on sim: set it to device", text), text
