"""What one rank alone cannot make is an error on every rank at its next first step, and nothing after that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.helpers import api, ranks
from tests.helpers.failures import Met, meet
from tests.helpers.models import WIDTH, rows_of_floats
from tests.helpers.pipelines import make_schedule, make_stages, step

pytestmark = api.ours_only("hangs in all of these")

RANKS, REFUSED = 3, 1
SOON = 5.0  # seconds; the deadline, which these tests never come to, is half an hour
_mse = nn.functional.mse_loss


def _stages(group: dist.ProcessGroup | None = None) -> list[Any]:
    return make_stages({dist.get_rank(group): nn.Linear(WIDTH, WIDTH)}, dist.get_world_size(group), group)


def _schedule(name: str = "1F1B", group: dist.ProcessGroup | None = None) -> Any:
    return make_schedule(name, _stages(group), 4, _mse)


def _step(schedule: Any) -> None:
    step(schedule, schedule._stages, rows_of_floats(8, 0))


class _RaisesAfterIts(api.PipelineStage):  # type: ignore[name-defined, misc]
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        raise KeyError("the user's own")


class _RaisesBeforeIts(api.schedules.Schedule1F1B):  # type: ignore[name-defined, misc]
    def __init__(self, *args: Any) -> None:
        raise KeyError("before its stage is known")


def _of_stage(index: int, kind: Any = api.PipelineStage) -> Any:
    return kind(nn.Linear(WIDTH, WIDTH), index, RANKS, torch.device("cpu"))


def _with_order(order: Any) -> None:
    schedule = api.schedules._PipelineScheduleRuntime(_stages(), 4, _mse)
    schedule.pipeline_order = order
    _step(schedule)


# What rank 1 does instead of making its schedule, and what the other ranks are told of it.
REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: _of_stage(RANKS), "PipelineUsageError: Stage index 3 is out of range of 3"),
    (lambda: _of_stage(None), "PipelineTypeError: stage_index must be an int"),  # type: ignore[arg-type]
    (lambda: _of_stage(REFUSED, _RaisesAfterIts), 'KeyError: "the user\'s own"'),
    (lambda: api.PipelineStage(nn.Linear(2, 2), 1), "TypeError"),
    (lambda: api.schedules.Schedule1F1B(_stages()[0], 0), "n_microbatches must be at least 1"),
    (lambda: api.schedules.Schedule1F1B(_stages()[0], 4, loss_fn=3), "PipelineTypeError: loss_fn must be"),
    (lambda: api.schedules.Schedule1F1B(_stages()[0]), "TypeError"),
    (lambda: api.schedules.ScheduleInterleaved1F1B(_stages()[0], 4), "takes a list of stages"),
    (lambda: api.schedules.ScheduleGPipe(nn.Linear(2, 2), 4), "a schedule's stage must be a pp_runtime stage"),
    (lambda: api.schedules.ScheduleZBVZeroBubble(_stages(), 4), "ZBVZeroBubble"),
    (lambda: _RaisesBeforeIts(_stages()[0]), "before its stage is known"),
    (lambda: api.schedules._PipelineScheduleRuntime(_stages(), 4)._load_csv("/no/such.csv"), "FileNotFoundError"),
    (lambda: _step(api.schedules._PipelineScheduleRuntime(_stages(), 4)), "has no order of its own"),
    (lambda: _with_order({0: []}), "InvalidOrderError"),
]


def _refuse_each(rank: int) -> list[str]:
    found = []
    for place, (refusal, says) in enumerate(REFUSALS):
        met = meet(refusal if rank == REFUSED else lambda: _step(_schedule()))
        if met is None or says.split(": ")[-1] not in met.text and says not in met.kinds[0]:
            found.append(f"{place}: {met}, not {says}")
        elif rank != REFUSED and (met.facts["rank"] != REFUSED or met.seconds > SOON or says not in met.text):
            found.append(f"{place}: {met}")
        _step(_schedule())  # raises if anything is left
    return found


def test_whatever_one_rank_refuses_is_raised_by_all_once() -> None:
    assert ranks.run(_refuse_each, RANKS, timeout=100) == [[]] * RANKS


def _met_by_others(rank: int, times: int) -> list[Met | None]:
    return [] if rank == REFUSED else [meet(lambda: _step(_schedule())) for _ in range(times)]


def _in_many_ways(rank: int) -> list[str]:
    found = []

    def told(way: str, mets: list[Met | None], says: str = "n_microbatches") -> None:
        found.extend(f"{way}: {met}" for met in mets if met is None or says not in met.text or met.seconds > SOON)

    # Refused twice before the others come: each of them counts.
    for count in (0, -1) if rank == REFUSED else ():
        meet(lambda count=count: api.schedules.ScheduleGPipe(_stages()[0], count))
    dist.barrier()
    told("twice", _met_by_others(rank, 2))
    _step(_schedule())

    # Refused while the others wait, who then try the same schedule again.
    schedule = _schedule()
    if rank == REFUSED:
        time.sleep(0.2)  # nothing tells that the others wait; they may also come later
        meet(lambda: api.schedules.ScheduleGPipe(_stages()[0], 0))
    else:
        told("while others wait", [meet(lambda: _step(schedule))])
    _step(schedule)

    # Refused by all alike: nobody is left to be told.
    meet(lambda: api.schedules.ScheduleGPipe(_stages()[0], 0))
    _step(_schedule())

    # Made and never stepped, in different numbers; a step that is refused; then another schedule.
    _, schedule = [_schedule("GPipe") for _ in range(rank + 1)], _schedule()
    mets = [meet(lambda: schedule.step(unknown=3) if rank == REFUSED else _step(schedule))]
    told("a first step", mets if rank != REFUSED else [], "unknown")
    _step(schedule)
    _step(_schedule("GPipe"))

    # Of a group of some ranks: the others and the whole are not concerned.
    pair = dist.new_group([0, 1])
    if rank == REFUSED:
        meet(lambda: api.schedules.Schedule1F1B(_stages(pair)[0], 0))
    _step(_schedule())
    if rank == 0:
        told("sub-group", [meet(lambda: _step(_schedule(group=pair)))])
    if rank < 2:
        _step(_schedule(group=pair))
    _step(_schedule())
    return found


def test_refusals_are_counted_alike_on_every_rank() -> None:
    assert ranks.run(_in_many_ways, RANKS) == [[]] * RANKS


def _stay_away(rank: int) -> list[str]:
    """Rank 1 leaves one schedule out without a word; the others give up, and go on to the next."""
    from pp_runtime.running.agreement import agreement

    _step(_schedule())
    if rank != REFUSED:
        schedule = _schedule()
        schedule.deadline = 0.5
        met = meet(lambda: _step(schedule))
        if met is None or met.facts["rank"] != REFUSED or "to begin its first step" not in met.text:
            return [f"{met}"]
    dist.barrier()
    assert dist.group.WORLD is not None
    while rank == REFUSED and not agreement._group_store(dist.group.WORLD).store.check(["pp_runtime/2/claim/0"]):
        time.sleep(0.001)
    schedule = _schedule("GPipe")
    for _ in range(2):
        _step(schedule)
    return []


def test_a_rank_that_left_a_schedule_out_joins_the_others_at_the_next() -> None:
    assert ranks.run(_stay_away, 2) == [[]] * 2


def _differ(rank: int) -> list[str]:
    """What each rank is told where two schedules, or two orders of one schedule, differ."""
    different = [meet(lambda: _step(_schedule(["1F1B", "GPipe"][rank]))) for _ in range(2)]
    rows = {0: ["0F0", "0F1", "0B0", "0B1"], 1: ["1F0", "1B0", "1F1", "1B1"]}
    if rank == 1:
        rows[0] = ["0F0", "0F1", "0B0"]
        rows[1] = ["1F0", "1F1", "1B0", "1B1"]
        rows[0].append("0B1")
    schedule = api.schedules._PipelineScheduleRuntime(_stages(), 2, _mse)
    schedule.pipeline_order = {
        owner: [api.schedules._Action.from_str(text) for text in row] for owner, row in rows.items()
    }
    orders = meet(lambda: _step(schedule))
    _step(_schedule())
    return [met.text if met is not None else "" for met in (*different, orders)]


def test_schedules_that_differ_are_told_by_their_names_and_orders_by_their_first_action() -> None:
    for first, second, orders in ranks.run(_differ, 2):
        assert (
            first
            == second
            == ("rank 0 runs Schedule1F1B and rank 1 runs ScheduleGPipe: make the same schedule on every rank")
        )
        assert "action 1 of rank 1 is 1B0 in the one and 1F1 in the other" in orders, orders


_PROGRAM = """
import sys, torch, torch.distributed as dist
from pp_runtime import PipelineStage, ScheduleGPipe
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
if rank == 0:
    raise ValueError("no weights here")
stage = PipelineStage(torch.nn.Linear(2, 2), rank, 2, torch.device("cpu"))
ScheduleGPipe(stage, 2, loss_fn=torch.nn.functional.mse_loss).step(target=torch.zeros(2, 2))
"""


def test_a_program_that_its_own_error_ends_tells_the_others(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", _PROGRAM]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    try:
        errors = [program.communicate(timeout=60)[1] for program in started]
    finally:
        for program in started:
            program.kill()
    assert "PipelineError: rank 0: ValueError: no weights here" in errors[1], errors[1]
