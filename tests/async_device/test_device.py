"""The asynchronous device itself: it is as asynchronous, and as merciless, as a real one."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.async_device import device
from tests.async_device.device import DEVICE
from tests.helpers import models

pytestmark = pytest.mark.timeout(300)


def _call(rank: int, part: Callable[[Any], Any]) -> Any:
    return part(device.load())


def _alone(part: Callable[[Any], Any], **options: Any) -> Any:
    """In a process of its own, without delays."""
    return device.run(_call, 1, delay_us=0, part=part, **options)[0]


def _run_ahead(sim: Any) -> tuple[float, float, float]:
    x = torch.zeros(1).to(DEVICE)
    begun = time.monotonic()
    sim.queue_sleep(100_000)
    x.add_(1)
    queued = time.monotonic() - begun
    value = x.item()
    return queued, time.monotonic() - begun, value


def test_the_host_runs_ahead_of_the_device() -> None:
    queued, done, value = _alone(_run_ahead)
    assert queued < 0.05 and done > 0.1 and value == 1


def _read_elsewhere(waits: bool) -> float:
    x = torch.zeros(1).to(DEVICE)
    other = torch.Stream(DEVICE)
    torch.accelerator.synchronize()
    device.load().queue_sleep(50_000)
    x.fill_(7)
    if waits:
        other.wait_stream(torch.accelerator.current_stream())
    with other:
        y = x.clone()
    torch.accelerator.synchronize()
    return y.item()


def _read_with_and_without_a_wait(sim: Any) -> tuple[float, float]:
    return _read_elsewhere(True), _read_elsewhere(False)


def test_a_stream_sees_the_work_of_another_only_where_it_waits() -> None:
    assert _alone(_read_with_and_without_a_wait) == (7, 0)


def _free_while_it_is_read(sim: Any, recorded: bool) -> float:
    """Another stream reads late; the tensor is freed at once, and its memory taken by the next."""
    x = torch.full((4,), 7.0).to(DEVICE)
    other = torch.Stream(DEVICE)
    other.wait_stream(torch.accelerator.current_stream())
    with other:
        sim.queue_sleep(50_000)
        y = x.clone()
    if recorded:
        x.record_stream(other)
    del x
    z = torch.full((4,), 9.0).to(DEVICE)
    torch.accelerator.synchronize()
    return y[0].item() + 0 * z[0].item()


def _free_early(sim: Any) -> tuple[float, float]:
    return _free_while_it_is_read(sim, True), _free_while_it_is_read(sim, False)


def test_memory_that_another_stream_uses_is_reused_unless_its_use_is_recorded() -> None:
    assert _alone(_free_early) == (7, 9)


def _read_freed(sim: Any, poison: bool) -> float:
    sim.set_poison(poison)
    x = torch.full((4,), 7.0).to(DEVICE)
    other = torch.Stream(DEVICE)
    other.wait_stream(torch.accelerator.current_stream())
    with other:
        sim.queue_sleep(50_000)
        y = x.clone()
    del x
    torch.accelerator.synchronize()
    return y[0].item()


def _read_poison(sim: Any) -> tuple[float, float]:
    return _read_freed(sim, False), _read_freed(sim, True)


def test_freed_memory_is_poisoned_in_the_order_of_its_stream() -> None:
    kept, poisoned = _alone(_read_poison)
    assert kept == 7 and math.isnan(poisoned)


def _time_kernels(sim: Any, seed: int) -> list[float]:
    """Milliseconds from kernel to kernel."""
    sim.set_delays(20_000, 2, seed)
    x = torch.zeros(1).to(DEVICE)
    events = [torch.Event(DEVICE, enable_timing=True) for _ in range(13)]
    for event in events:
        x.add_(1)
        event.record()
    torch.accelerator.synchronize()
    sim.set_delays(0, 2, seed)
    return [before.elapsed_time(after) for before, after in zip(events, events[1:], strict=False)]


def _draw_delays(sim: Any) -> list[list[float]]:
    return [_least([_time_kernels(sim, seed) for _ in range(3)]) for seed in (1, 1, 2)]


def _least(runs: list[list[float]]) -> list[float]:
    """Of each kernel: a thread that wakes up late only adds to it."""
    return [min(times) for times in zip(*runs, strict=True)]


def test_delays_come_from_their_seed() -> None:
    first, again, other = _alone(_draw_delays)

    def distance(one: list[float], two: list[float]) -> float:
        return sum(abs(a - b) for a, b in zip(one, two, strict=True))

    assert sum(first) > 20
    assert distance(first, again) < distance(first, other) / 2, (first, again, other)


def _fail(sim: Any) -> list[str]:
    """What the host hears of a kernel that failed: at its next wait and ever after."""
    x = torch.ones(1).to(DEVICE)
    sim.queue_failure("an illegal memory access")
    x.add_(1)
    heard = []
    for look in (x.item, torch.accelerator.synchronize, x.item):
        try:
            look()
        except RuntimeError as error:
            heard.append(str(error))
    sim.forget_failure()
    return [*heard, str(x.item())]


def test_an_error_on_a_stream_stays() -> None:
    *heard, value = _alone(_fail)
    assert len(heard) == 3 and all("an illegal memory access" in text for text in heard)
    assert value == "1.0"  # nothing ran after it


def _sleep(sim: Any) -> tuple[float, float, float]:
    """Seconds on the host and milliseconds on the device of 20 products of 5 ms; bytes of a buffer of 1 GB."""
    x = torch.zeros(4, 4).to(DEVICE)
    begin, end = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
    torch.accelerator.synchronize()
    sim.set_poison(False)
    sim.sleep_instead_of_computing({"aten::mm": 5000.0}, others_us=0.0, transfer_us=0.0, launch_us=500.0)
    begin.record()
    begun = time.monotonic()
    for _ in range(20):
        x = x @ x
    queued = time.monotonic() - begun
    end.record()
    torch.empty(1 << 28, device=DEVICE)
    torch.accelerator.synchronize()
    return queued, begin.elapsed_time(end), sim.memory_in_use()[1] / 2**30


def test_streams_that_sleep_have_a_devices_times() -> None:
    queued, elapsed, most = _alone(_sleep)
    assert 0.01 <= queued < 0.1  # 20 launches of half a millisecond
    assert 100 <= elapsed < 110
    assert 1 <= most < 1.01


def _exchange(rank: int) -> list[Any]:
    """A message that its receiver takes late, then one that never comes."""
    sim, group = device.load(), dist.group.WORLD
    backend = group._get_backend(DEVICE)
    x = torch.full((1000, 1000), float(rank)).to(DEVICE)
    if rank == 1:
        sim.queue_sleep(200_000)
    begun = time.monotonic()
    work = (backend.recv if rank else backend.send)([x], 1 - rank, 0)
    queued = time.monotonic() - begun
    work.wait()
    found = [x[0, 0].item() == 0, queued < 0.1, time.monotonic() - begun > 0.15]
    dist.barrier()
    lost = backend.recv([x], 1 - rank, 0)
    backend.abort()
    lost.wait()
    torch.accelerator.synchronize()
    return found


@pytest.mark.parametrize("rendezvous", [True, False])
def test_messages_are_work_of_streams(rendezvous: bool) -> None:
    # 4 MB are more than a socket holds, so the sender waits for the receiver either way.
    found = device.run(_exchange, 2, delay_us=0, rendezvous=rendezvous)
    assert found == [[True] * 3] * 2


def _train_a_transformer(sim: Any) -> list[float]:
    """Losses of a transformer on the device and on the CPU."""
    example = models.build(models.transformer, 2)
    plain = nn.Sequential(*example.stages)
    losses = []
    for place in (torch.device("cpu"), DEVICE):
        model = copy.deepcopy(plain).to(place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        values: list[Tensor] = []
        for number in range(3):
            batch = example.batch(4, number).to(place)
            loss = example.loss_fn(model(*batch.args), batch.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.detach())
        losses.append([value.item() for value in values])
    return losses


def test_a_model_trains_as_on_the_cpu() -> None:
    cpu, ours = _alone(_train_a_transformer)
    assert ours == pytest.approx(cpu, rel=1e-5)
