"""Channels: what a user keeps, messages of any size, few cores, forced transports, and what a crash leaves."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pp_runtime import _C
from pp_runtime.errors import PipelineError
from pp_runtime.running import runtime
from tests.helpers import api, ranks
from tests.helpers.failures import meet
from tests.helpers.models import rows_of_floats
from tests.helpers.pipelines import Setting, Twins, held_by, make_schedule, make_stages, step

pytestmark = api.ours_only("its transport is the process group")

RANKS, MICROBATCHES = 2, 6
TRANSPORTS = ["shared_memory", "c10d"]


def shared_segments() -> list[tuple[int, int]]:
    """Where the runtime's shared memory lies in this process: first and last address of each mapping."""
    maps = Path("/proc/self/maps").read_text()
    return [
        (int(begin, 16), int(end, 16))
        for begin, end in re.findall(r"^(\w+)-(\w+) .*memfd:pp_runtime", maps, re.MULTILINE)
    ]


def in_shared_memory(tensor: Tensor) -> bool:
    return any(begin <= tensor.data_ptr() < end for begin, end in shared_segments())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Keeper(nn.Module):
    """Keeps what it receives, activations and gradients, beside a copy of what they were."""

    def __init__(self, width: int = 4, keeps: bool = True) -> None:
        super().__init__()
        self.linear, self.keeps = nn.Linear(width, width), keeps
        self.kept = list[tuple[Tensor, Tensor]]()
        self.shared = list[bool]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.keep(x)
        if y.requires_grad:
            y.register_hook(self.keep)
        return y

    def keep(self, tensor: Tensor) -> None:
        self.shared.append(in_shared_memory(tensor))
        if self.keeps:
            self.kept.append((tensor.detach(), tensor.detach().clone()))


# What users keep


def _keep_everything(rank: int, schedule: str, stages_per_rank: int, transport: str) -> tuple[list[str], float]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    torch.manual_seed(rank)
    modules = {index: Keeper() for index in held_by(rank, schedule, RANKS, stages_per_rank)}
    stages = make_stages(modules, RANKS * stages_per_rank)
    pipeline = make_schedule(schedule, stages, MICROBATCHES, nn.functional.mse_loss)
    begin = time.monotonic()
    for number, method in enumerate(["step", "step", "eval", "step"]):
        step(pipeline, stages, rows_of_floats(3 * MICROBATCHES, number), method)
    taken = time.monotonic() - begin
    wrong = [
        f"stage {index}: the tensor kept as number {number} was overwritten"
        for index, module in modules.items()
        for number, (tensor, copy) in enumerate(module.kept)
        if not torch.equal(tensor, copy)
    ]
    del pipeline, stages
    wrong += [
        f"stage {index}: a tensor died with the pipeline"
        for index, module in modules.items()
        for tensor, copy in module.kept
        if not torch.equal(tensor, copy)
    ]
    return wrong, taken


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("GPipe", 1), ("1F1B", 1), ("ZBVZeroBubble", 2)])
def test_kept_tensors_are_never_overwritten_and_stall_nobody(
    schedule: str, stages_per_rank: int, transport: str
) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "transport": transport}
    for wrong, taken in ranks.run(_keep_everything, RANKS, **arguments):
        assert not wrong
        assert taken < 10


def _where_tensors_lie(rank: int, keeps: bool) -> tuple[list[bool], list[bool]]:
    os.environ["PP_RUNTIME_TRANSPORT"] = "shared_memory"
    module = Keeper(keeps=keeps)
    stages = make_stages({rank: module}, RANKS)
    pipeline = make_schedule("1F1B", stages, 12, nn.functional.mse_loss)
    for number in range(2):
        step(pipeline, stages, rows_of_floats(24, number))
    return module.shared, [in_shared_memory(tensor) for tensor, _ in module.kept]


def test_the_receiver_of_a_message_copies_nothing() -> None:
    first, last = ranks.run(_where_tensors_lie, RANKS, keeps=False)
    # The first stage receives gradients alone, the last one activations alone; what is not received is not shared.
    assert first[0].count(True) == last[0].count(True) == 2 * 12


def test_what_is_kept_beyond_the_room_of_its_channel_is_moved_out() -> None:
    for shared, still in ranks.run(_where_tensors_lie, RANKS, keeps=True):
        assert shared.count(True) >= 1
        assert still.count(True) <= 3  # a 1F1B channel of two ranks has room for three


# Sizes


def _change_sizes(rank: int, schedule: str, stages_per_rank: int, transport: str) -> list[str]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    twins = Twins(rank, Setting(schedule, MICROBATCHES, stages_per_rank, model="tuples"))
    rows = [6, 18_000, 60, 40_000, 7, 90_000, 6]
    return [
        line for n, count in enumerate(rows) for line in twins.train(f"{count} rows", twins.example.batch(count, n))
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("1F1B", 1), ("InterleavedZeroBubble", 2)])
def test_messages_may_be_larger_than_all_before(schedule: str, stages_per_rank: int, transport: str) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "transport": transport}
    assert ranks.run(_change_sizes, RANKS, **arguments) == [[]] * RANKS


def _sends_of_each_step(rank: int) -> list[int]:
    os.environ["PP_RUNTIME_TRANSPORT"] = "c10d"
    stages = make_stages({rank: nn.Identity()}, RANKS)
    pipeline = make_schedule("GPipe", stages, 8, None)
    counts = []
    for rows in (8, 8000, 8000, 80, 80):
        with profile(activities=[ProfilerActivity.CPU]) as events:
            pipeline.eval(*((torch.zeros(rows, 16),) if rank == 0 else ()))
        counts.append(sum(event.count for event in events.key_averages() if event.key == "gloo:send"))
    return counts


def test_messages_of_the_size_of_the_last_step_s_travel_in_one_piece() -> None:
    # Eight microbatches, and the word that the step is done. The second step's are larger than the first's.
    assert ranks.run(_sends_of_each_step, RANKS)[0] == [9, 17, 9, 9, 9]


def _microbatches_of_many_sizes(rank: int, transport: str) -> list[str]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    torch.manual_seed(7)
    modules = [nn.Linear(16, 16) for _ in range(RANKS)]
    stage = make_stages({rank: modules[rank]}, RANKS)
    pipeline = make_schedule("GPipe", stage, 8, nn.functional.mse_loss)
    draw = random.Random(0)
    found = []
    for number in range(12):
        pieces = [torch.randn(draw.choice([0, 1, 5, 300, 3000]) + 1, 16) for _ in range(8)]
        losses: list[Tensor] = []
        arguments: dict[str, Any] = {"arg_mbs": [(piece,) for piece in pieces]} if rank == 0 else {"arg_mbs": [()] * 8}
        arguments["kwarg_mbs"] = [{}] * 8
        if rank == 1:
            arguments |= {"target_mbs": pieces, "losses": losses}
        pipeline.step(**arguments, return_outputs=False)
        if rank == 1:
            expected = [nn.functional.mse_loss(modules[1](modules[0](piece)), piece) for piece in pieces]
            if not all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True)):
                found.append(f"step {number}: {losses} instead of {expected}")
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_microbatch_may_have_a_size_of_its_own(transport: str) -> None:
    assert ranks.run(_microbatches_of_many_sizes, RANKS, transport=transport) == [[]] * RANKS


def _mapped_bytes(rank: int, microbatches: int) -> int:
    module = Keeper(1024, keeps=False)
    stages = make_stages({rank: module}, RANKS)
    pipeline = make_schedule("1F1B", stages, microbatches, nn.functional.mse_loss)
    for number in range(3):
        step(pipeline, stages, rows_of_floats(4 * microbatches, number, 1024))
    return sum(end - begin for begin, end in shared_segments())


def test_a_channel_has_as_much_room_as_the_plan_gives_it_whatever_the_microbatches() -> None:
    assert ranks.run(_mapped_bytes, RANKS, microbatches=4) == ranks.run(_mapped_bytes, RANKS, microbatches=32)


def _train_many_microbatches(rank: int, schedule: str, stages_per_rank: int, transport: str) -> list[str]:
    os.environ |= {"PP_RUNTIME_TRANSPORT": transport, "PP_RUNTIME_DEADLINE": "20"}
    twins = Twins(rank, Setting(schedule, 60, stages_per_rank))
    found = twins.train("step", twins.example.batch(120, 0))
    step(twins.schedule, twins.stages, twins.example.batch(120, 1), "eval")
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("LoopedBFS", 2), ("Interleaved1F1B", 3)])
def test_ranks_that_send_long_before_they_take_do_not_wait_for_each_other(
    schedule: str, stages_per_rank: int, transport: str
) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "transport": transport}
    assert ranks.run(_train_many_microbatches, RANKS, **arguments) == [[]] * RANKS


def _misspell(rank: int, variable: str) -> str:
    os.environ[variable] = "many"
    pipeline = make_schedule("GPipe", make_stages({rank: nn.Linear(4, 4)}, RANKS), 2, None)
    met = meet(lambda: pipeline.step(*([torch.ones(2, 4)] if rank == 0 else [])))
    assert met is not None and met.is_a("PipelineUsageError"), met
    return met.text


@pytest.mark.parametrize("variable", ["PP_RUNTIME_TRANSPORT", "PP_RUNTIME_COMMUNICATORS"])
def test_a_value_that_nobody_knows_is_refused_on_a_cpu_too(variable: str) -> None:
    for text in ranks.run(_misspell, RANKS, variable=variable):
        assert f"{variable} is 'many': choose one of auto, " in text


# Many ranks, few cores


def _train_on_two_cores(rank: int, schedule: str, stages_per_rank: int, transport: str) -> tuple[list[str], float]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    twins = Twins(rank, Setting(schedule, 8, stages_per_rank))
    found = twins.train("first step", twins.example.batch(16, 0))
    begin = time.monotonic()
    for number in range(1, 4):
        found += twins.train(f"step {number}", twins.example.batch(16, number))
    return found, time.monotonic() - begin


@pytest.mark.parametrize(
    ("num_ranks", "schedule", "stages_per_rank", "transport"),
    [
        (3, "1F1B", 1, "c10d"),
        (4, "Interleaved1F1B", 2, "shared_memory"),
        (5, "GPipe", 1, "shared_memory"),
        (8, "1F1B", 1, "shared_memory"),
        (8, "ZBVZeroBubble", 2, "shared_memory"),
    ],
)
def test_many_ranks_share_two_cores(num_ranks: int, schedule: str, stages_per_rank: int, transport: str) -> None:
    arguments = {"schedule": schedule, "stages_per_rank": stages_per_rank, "transport": transport}
    for found, taken in ranks.run(_train_on_two_cores, num_ranks, **arguments):
        assert not found
        assert taken < 15  # tens of milliseconds where nothing else runs


# Choosing a transport


def _channels_opened(rank: int, transport: str | None, unreachable: int | None = None) -> tuple[list[str], list[str]]:
    if transport is not None:
        os.environ["PP_RUNTIME_TRANSPORT"] = transport
    if rank == unreachable:
        _C.Token.matches = staticmethod(lambda pid, fd, value: pid == os.getpid())  # type: ignore[method-assign]
    kinds, open_channels = set[str](), runtime.open_channels

    def watched(*args: Any, **kwargs: Any) -> Any:
        opened = open_channels(*args, **kwargs)
        kinds.update(type(end).__name__[:4] for end in (*opened.senders.values(), *opened.receivers.values()))
        return opened

    runtime.open_channels = watched
    twins = Twins(rank, Setting("1F1B", 4))
    return twins.train("step", twins.example.batch(8, 0)), sorted(kinds)


@pytest.mark.parametrize(
    ("transport", "kind"), [(None, "Shar"), ("auto", "Shar"), ("shared_memory", "Shar"), ("c10d", "C10d")]
)
def test_the_environment_variable_chooses_the_transport(transport: str | None, kind: str) -> None:
    assert ranks.run(_channels_opened, RANKS, transport=transport) == [([], [kind])] * RANKS


def test_ranks_that_cannot_reach_a_rank_s_memory_use_c10d_with_it_alone() -> None:
    opened = ranks.run(_channels_opened, 4, transport="auto", unreachable=3)
    assert opened == [([], ["Shar"]), ([], ["Shar"]), ([], ["C10d", "Shar"]), ([], ["C10d"])]


def _refusal(rank: int, transport: str, unreachable: int | None = None) -> str:
    with pytest.raises((ValueError, PipelineError)) as refused:
        _channels_opened(rank, transport, unreachable)
    return str(refused.value)


def test_a_transport_that_is_none_is_refused_on_every_rank() -> None:
    for text in ranks.run(_refusal, RANKS, transport="carrier_pigeon"):
        assert "carrier_pigeon" in text and "shared_memory" in text


def test_shared_memory_by_force_is_refused_where_there_is_none() -> None:
    texts = ranks.run(_refusal, 3, transport="shared_memory", unreachable=2)
    assert all("does not share memory" in text for text in texts)


# What a crash leaves


def _crash(rank: int, transport: str, victim: int) -> tuple[float, int, int]:
    os.environ["PP_RUNTIME_TRANSPORT"] = transport
    before = descriptors()
    module = Keeper(keeps=False)
    stages = make_stages({rank: module}, 3)
    pipeline = make_schedule("1F1B", stages, MICROBATCHES, nn.functional.mse_loss)
    step(pipeline, stages, rows_of_floats(12, 0))
    if rank == victim:
        module.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    begin = time.monotonic()
    with pytest.raises(PipelineError):
        step(pipeline, stages, rows_of_floats(12, 1))
    taken = time.monotonic() - begin
    del pipeline, stages, module
    return taken, descriptors() - before, len(shared_segments())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_rank_leaves_no_shared_memory_and_no_descriptors(transport: str) -> None:
    victim, files = 1, set(os.listdir("/dev/shm"))
    survivors = ranks.run(_crash, 3, deaths=[victim], transport=transport, victim=victim)
    for taken, gained, segments in (survivors[0], survivors[2]):
        assert taken < 12
        assert segments == 0
        assert gained <= 1  # the connection to the store, where a rank opened its own
    assert {name for name in set(os.listdir("/dev/shm")) - files if "pp_runtime" in name} == set()
