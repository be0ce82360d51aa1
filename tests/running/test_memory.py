"""A step's memory: flat in the microbatches, handed over without a copy, nothing kept for nobody, no growth in time."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import api, ranks
from tests.helpers.models import rows_of_floats
from tests.helpers.pipelines import held_by, make_schedule, make_stages, step

pytestmark = api.ours_only("keeps buffers, sends and outputs")

RANKS, MICROBATCHES = 2, 6
WIDTH = 128 * 1024  # floats: 512 KiB
SCHEDULES = [("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2)]


def _growth(rank: int, schedule: str, fewest: int, most: int) -> float:
    from benchmarks import memory

    try:
        memory.forget_peak()
    except OSError as error:
        pytest.skip(f"this kernel does not reset the peak: {error}")
    memory.pages_of_their_own()
    memory.peak_of_step("ours", schedule, fewest, WIDTH)
    peaks = [memory.peak_of_step("ours", schedule, count, WIDTH) / (4 * WIDTH) for count in (fewest, most)]
    return memory.slope([fewest, most], peaks)


@pytest.mark.parametrize("schedule", ["GPipe", *(name for name, _ in SCHEDULES)])
def test_the_peak_does_not_grow_with_the_microbatches(schedule: str) -> None:
    growth = max(ranks.run(_growth, RANKS, schedule=schedule, fewest=16, most=112))
    assert growth < 0.05  # torch: 1 to 6


class Watched(nn.Module):
    """Knows where its input and its output lay."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.inputs, self.outputs, self.gradients = list[int](), list[int](), list[int]()
        self.linear.weight.register_post_accumulate_grad_hook(self._on_gradient)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.inputs.append(x.data_ptr())
        self.outputs.append(y.data_ptr())
        return y

    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients.append(parameter.grad.data_ptr())


def _watch(rank: int) -> tuple[dict[int, Watched], Any]:
    modules = {index: Watched() for index in held_by(rank, "ZBVZeroBubble", RANKS, 2)}
    stages = make_stages(modules, 2 * RANKS)
    pipeline = make_schedule("ZBVZeroBubble", stages, MICROBATCHES, nn.functional.mse_loss)
    for number in range(2):
        step(pipeline, stages, rows_of_floats(2 * MICROBATCHES, number))
    return modules, pipeline


def _hand_over(rank: int) -> None:
    modules, _ = _watch(rank)
    if rank == 1:  # the bottom of the V: stages 1 and 2
        assert modules[2].inputs == modules[1].outputs


def test_a_neighbour_on_the_same_rank_gets_the_output_itself() -> None:
    ranks.run(_hand_over, RANKS)


def _accumulate(rank: int) -> None:
    modules, _ = _watch(rank)
    for module in modules.values():
        first, second = module.gradients[:MICROBATCHES], module.gradients[MICROBATCHES:]
        assert len(first) == len(second) == MICROBATCHES
        assert len(set(first)) == len(set(second)) == 1
        # What the second step added is divided by itself, then added to the first step's, in its place.
        parameter = module.linear.weight
        assert parameter.grad is not None and parameter.grad.data_ptr() == first[0]


def test_gradients_accumulate_in_place() -> None:
    ranks.run(_accumulate, RANKS)


def _scale(rank: int) -> None:
    calls, divide = [], torch._foreach_div_
    torch._foreach_div_ = lambda tensors, factor: calls.append(len(tensors)) or divide(tensors, factor)
    modules = {rank: nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))}
    stages = make_stages(modules, RANKS)
    step(make_schedule("1F1B", stages, 4, nn.functional.mse_loss), stages, rows_of_floats(8, 0))
    assert calls == [6]


def test_gradients_are_scaled_at_once() -> None:
    ranks.run(_scale, RANKS)


class Giver(nn.Module):
    """Remembers its outputs' storages without keeping them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.given = nn.Linear(4, 4), list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        from torch.multiprocessing.reductions import StorageWeakRef

        y = self.linear(x)
        self.given.append(StorageWeakRef(y.untyped_storage()))
        return y


def _results(rank: int, schedule: str, stages_per_rank: int) -> None:
    gc.disable()
    held = held_by(rank, schedule, RANKS, stages_per_rank)
    modules = {index: Giver() for index in held}
    stages = make_stages(modules, RANKS * stages_per_rank)
    pipeline = make_schedule(schedule, stages, MICROBATCHES, nn.functional.mse_loss)
    batch = rows_of_floats(2 * MICROBATCHES, 0)
    last = RANKS * stages_per_rank - 1 in held
    outcome = step(pipeline, stages, batch)
    if last:
        assert outcome.outputs.grad_fn is None and not outcome.outputs.requires_grad
        assert [loss.grad_fn for loss in outcome.losses] == [None] * MICROBATCHES
    outcome = step(pipeline, stages, batch, return_outputs=False)
    assert outcome.outputs is None
    alive = sum(not storage.expired() for module in modules.values() for storage in module.given)
    assert not alive, f"{alive} outputs live on"


@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("GPipe", 1), *SCHEDULES])
def test_results_hold_no_graph_and_outputs_nobody_wants_are_not_kept(schedule: str, stages_per_rank: int) -> None:
    ranks.run(_results, RANKS, schedule=schedule, stages_per_rank=stages_per_rank)


def _soak(rank: int, schedule: str, transport: str) -> Any:
    from benchmarks import soak

    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    return soak.soak(schedule, warm_up=120, steps=120)


@pytest.mark.parametrize(
    ("schedule", "transport"),
    [("1F1B", "shared_memory"), ("ZBVZeroBubble", "shared_memory"), ("Interleaved1F1B", "c10d")],
)
def test_steps_leave_nothing_behind(schedule: str, transport: str) -> None:
    for before, after, _ in ranks.run(_soak, RANKS, schedule=schedule, transport=transport):
        assert (after.descriptors, after.threads) == (before.descriptors, before.threads)
        assert after.memory_kib - before.memory_kib < 2048  # noise; a leak of one activation a microbatch is 8 MiB


def _shared_bytes() -> int:
    """What this process's shared memory takes, in pages that were touched."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            total += entry.stat().st_blocks * 512 if "memfd:pp_runtime" in str(entry.readlink()) else 0
    return total


def _outgrow(rank: int) -> tuple[int, int]:
    stages = make_stages({rank: nn.Identity()}, RANKS)
    pipeline = make_schedule("1F1B", stages, 4, None)
    rows = 8
    for _ in range(8):
        rows = int(rows * 1.5)
        pipeline.eval(*((torch.zeros(rows, WIDTH // 4),) if rank == 0 else ()))
    return _shared_bytes(), -(-rows // 4) * WIDTH


def test_messages_that_outgrew_their_blocks_give_the_memory_back() -> None:
    (held, message), _ = ranks.run(_outgrow, RANKS)
    assert message <= held < 4 * message  # three messages under way, a quarter more than asked


def _open_and_drop(rank: int, transport: str) -> list[tuple[int, int]]:
    from benchmarks.soak import Usage

    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    counts = list[tuple[int, int]]()
    for number in range(6):
        stages = make_stages({rank: nn.Linear(4, 4)}, RANKS)
        step(make_schedule("1F1B", stages, 4, nn.functional.mse_loss), stages, rows_of_floats(8, number))
        del stages
        usage = Usage.now()
        counts.append((usage.descriptors, usage.threads))
    return counts


@pytest.mark.parametrize("transport", ["shared_memory", "c10d"])
def test_a_dropped_schedule_takes_its_descriptors_and_threads_with_it(transport: str) -> None:
    for counts in ranks.run(_open_and_drop, RANKS, transport=transport):
        assert counts[-1] == counts[1], counts  # the first opens what all share
