"""Receives, compute and sends of every schedule are in order on the lanes of a recorded device, slots reused.

The recording is made by the code that drives a real accelerator: under it stands a device that only writes down what it
is asked for, and that never says by itself that an event has passed.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pp_runtime import _C
from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders.catalogue import build_order
from pp_runtime.orders.edges import adjacent_edges
from pp_runtime.planning.lane_order import LaneEntry, merged, races
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.running.communicators import check_sequences, fewest_communicators
from pp_runtime.running.lanes import recorded_lanes
from tests.helpers import api, models, ranks
from tests.helpers.pipelines import EVERY_SCHEDULE, Setting, Twins, stages_allowed
from tests.schedules import test_custom_functions, test_user_orders
from tests.splitting import test_traced_models

pytestmark = api.ours_only("has no lanes of its own")


def _train(rank: int, setting: Setting, omitted_wait: int = -1, **options: Any) -> tuple[list[str], list[LaneEntry]]:
    """Train twins on recorded lanes; what differs from the plain model, and the recording."""
    with recorded_lanes(omitted_wait) as recording:
        twins = Twins(rank, setting, **options)
        found = []
        for number in range(setting.steps):
            found += twins.train(f"step {number}", twins.example.batch(2 * setting.microbatches, number))
        found += twins.evaluate("evaluation", twins.example.batch(2 * setting.microbatches, 9))
        return found, recording.entries()


def _writes(entries: list[LaneEntry]) -> Counter[str]:
    """How often each slot of a receiver was written."""
    return Counter(name for entry in entries for name in entry.writes if "receiver" in name)


def _train_all(rank: int, settings: list[Setting]) -> list[str]:
    found = []
    for setting in settings:
        differing, entries = _train(rank, setting)
        found += [f"[{setting}] {line}" for line in differing]
        found += [f"[{setting}] {race}" for race in races(entries)]
        writes = _writes(entries)
        if not writes or max(writes.values()) < 2:
            found.append(f"[{setting}] no slot was used twice: {writes}")
    return found


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
@pytest.mark.parametrize("count", [2, 3])
def test_every_schedule_is_in_order_and_equals_the_plain_model(count: int, schedule: str) -> None:
    settings = [Setting(schedule, 2 * count + 1, stages) for stages in stages_allowed(schedule)[-1:]]
    assert ranks.run(_train_all, count, settings=settings) == [[]] * count


def _on_lanes(rank: int, train: Callable[..., list[str]], **options: Any) -> list[str]:
    with recorded_lanes() as recording:
        found = train(rank, **options)
        entries = recording.entries()
    assert any(entry.kind == "wait" for entry in entries)
    return found + [str(race) for race in races(entries)]


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble"])
def test_skips_whose_gradients_are_added_up_are_in_order(schedule: str) -> None:
    options = {"name": "skips", "schedules": [schedule], "stages_per_rank": 2}
    assert ranks.run(_on_lanes, 2, train=test_traced_models._compare, **options) == [[], []]


def test_the_users_own_functions_are_in_order() -> None:
    options = {"schedule": "DualPipeV", "stages_per_rank": 2, "kinds": ["F", "B", "I", "W", "OVERLAP_F_B"]}
    assert ranks.run(_on_lanes, 2, train=test_custom_functions._train_with, **options) == [[], []]


@pytest.mark.parametrize("name", test_user_orders.ORDERS)
def test_a_loaded_order_is_in_order(name: str, tmp_path: Path) -> None:
    rows, owners = test_user_orders.ORDERS[name]()
    path = test_user_orders._write(tmp_path / "order.csv", rows)
    assert ranks.run(_on_lanes, 2, train=test_user_orders._train, path=path, owners=owners) == [[], []]


def _on_device_channels(rank: int, setting: Setting, omitted_wait: int = -1) -> tuple[list[str], list[LaneEntry]]:
    os.environ["PP_RUNTIME_TRANSPORT"] = "device"
    return _train(rank, setting, omitted_wait)


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "DualPipeV", "LoopedBFS"])
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_that_write_into_each_others_memory_are_in_order_together(count: int, schedule: str) -> None:
    setting = Setting(schedule, 2 * count + 1, stages_allowed(schedule)[-1])
    trained = ranks.run(_on_device_channels, count, setting=setting)
    assert [differing for differing, _ in trained] == [[]] * count
    entries = merged(dict(enumerate(entries for _, entries in trained)))
    assert [str(race) for race in races(entries)] == []
    writes = Counter(name for entry in entries for name in entry.writes if name.startswith("shared "))
    assert max(writes.values()) >= 2, "no slot was used twice"
    assert any(entry.kind == "await" and entry.text.startswith("freed") for entry in entries)


def test_a_wait_for_another_ranks_number_that_is_forgotten_is_named() -> None:
    (_, whole), (_, other) = ranks.run(_on_device_channels, 2, setting=Setting("1F1B", 6))
    awaits = [place for place, entry in enumerate(whole) if entry.kind == "await" and "arrived" in entry.text]
    for place in awaits:
        left = merged({0: whole[:place] + whole[place + 1 :], 1: other})
        assert any("copy for" in str(race) for race in races(left)), whole[place]


def test_a_wait_that_is_queued_before_what_ends_it_is_named() -> None:
    (_, first), (_, second) = ranks.run(_on_device_channels, 2, setting=Setting("1F1B", 4))
    early = [entry._replace(time=entry.time - 10**12) if entry.kind == "await" else entry for entry in second]
    assert any("was not queued before" in str(found) for found in races(merged({0: first, 1: early})))


def _without_each_wait(rank: int) -> tuple[int, list[str]]:
    """Take each wait out of a recording; say which the proof does not miss or does not name.

    What the host saw pass is taken out too, for it may stand in for a wait.
    """
    _, everything = _train(rank, Setting("1F1B", 6))
    entries = [entry for entry in everything if entry.kind != "passed"]
    without_host = set(races(entries))
    marks = {entry.event: entry.lane for entry in entries if entry.kind == "mark"}
    waits = [place for place, entry in enumerate(entries) if entry.kind == "wait"]
    unnamed = []
    for place in waits:
        wait = entries[place]
        found = set(races(entries[:place] + entries[place + 1 :])) - without_host
        if (wait.lane, marks[wait.event]) not in {(race.later.lane, race.earlier.lane) for race in found}:
            unnamed.append(f"{wait.lane} waits for {marks[wait.event]}")
    return len(waits), unnamed


def _with_a_wait_forgotten(rank: int) -> list[str]:
    return [str(race) for race in races(_train(rank, Setting("1F1B", 6), omitted_wait=4)[1])]


def test_a_wait_that_the_runtime_forgets_is_named() -> None:
    for found in ranks.run(_with_a_wait_forgotten, 2):
        assert found
        assert all("does not wait for" in line for line in found)


def _lanes_wait_for(rank: int) -> dict[str, set[str]]:
    """For each lane, whose marks it waits for."""
    _, entries = _train(rank, Setting("InterleavedZeroBubble", 6, 2))
    marks = {entry.event: entry.lane for entry in entries if entry.kind == "mark"}
    found: dict[str, set[str]] = {}
    for entry in entries:
        if entry.kind == "wait":
            found.setdefault(entry.lane, set()).add(marks[entry.event])
    return found


def test_receives_and_sends_wait_for_compute_only() -> None:
    for waits in ranks.run(_lanes_wait_for, 2):
        waits.pop("compute")
        assert len(waits) > 4  # a lane a channel
        assert set.union(*waits.values()) == {"compute"}


def _keep(rank: int) -> list[str]:
    stage = models.Keeps()
    with recorded_lanes() as recording:
        pipeline = api.PipelineStage(stage, rank, 2, torch.device("cpu"))
        schedule = api.schedules.Schedule1F1B(pipeline, 6, loss_fn=nn.functional.mse_loss)
        for _ in range(3):
            if rank == 0:
                schedule.step(torch.randn(12, 4))
            else:
                schedule.step(target=torch.randn(12, 4))
        found = [str(race) for race in races(recording.entries())]
    return found + [f"input {i} changed" for i, (kept, copy) in enumerate(stage.kept) if not torch.equal(kept, copy)]


def test_a_received_tensor_that_is_kept_is_never_overwritten() -> None:
    assert ranks.run(_keep, 2) == [[], []]


def _time(rank: int) -> list[str]:
    with recorded_lanes():
        twins = Twins(rank, Setting("1F1B", 4))
        twins.schedule.record_timeline = True
        twins.train("step", twins.example.batch(8, 0))
        spans = twins.schedule.timeline().of_rank(rank)
    assert all(span.start <= span.end and 0 <= span.waited <= span.end - span.start for span in spans)
    return [span.action for span in spans if span.kind in "FB"]


def test_a_timeline_is_taken_from_the_lanes_clock() -> None:
    first, second = ranks.run(_time, 2)
    assert first == "0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3".split()
    assert second == "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3".split()


@pytest.mark.parametrize("kind", ["pair", "direction", "shared"])
def test_communicators_are_shared_only_where_both_ends_have_one_sequence(kind: str) -> None:
    order, placement = build_order("1F1B", 2, 2, 4)
    with_comms = insert_communication(order, placement)
    check_sequences(with_comms, placement, adjacent_edges(2), "edge")
    if kind != "shared":
        check_sequences(with_comms, placement, adjacent_edges(2), kind)
    else:
        with pytest.raises(PipelineUsageError, match="ranks 0 and 1 send and receive in different sequences"):
            check_sequences(with_comms, placement, adjacent_edges(2), kind)


@pytest.mark.parametrize("schedule", [name for name in EVERY_SCHEDULE if name != "Auto"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_fewest_communicators_that_an_order_allows_are_chosen(count: int, schedule: str) -> None:
    stages = stages_allowed(schedule)[-1] * count
    order, placement = build_order(schedule, count, stages, 2 * count)
    edges = adjacent_edges(stages)
    with_comms = insert_communication(order, placement)
    kind = fewest_communicators([with_comms], placement, edges)
    check_sequences(with_comms, placement, edges, kind)
    fewer = {"pair": (), "direction": ("pair",), "edge": ("pair", "direction")}[kind]
    for refused in fewer:
        with pytest.raises(PipelineUsageError, match="different sequences"):
            check_sequences(with_comms, placement, edges, refused)


def _train_over(rank: int, kind: str, schedule: str) -> list[str]:
    os.environ["PP_RUNTIME_COMMUNICATORS"] = kind
    differing, entries = _train(rank, Setting(schedule, 3))
    return differing + [str(race) for race in races(entries)]


@pytest.mark.parametrize("kind", ["direction", "shared"])
def test_fewer_communicators_serve_schedules_that_allow_it(kind: str) -> None:
    assert ranks.run(_train_over, 2, kind=kind, schedule="GPipe") == [[], []]


def test_a_process_without_recorded_lanes_has_none_on_the_cpu() -> None:
    from pp_runtime.running.lanes import lanes_for

    assert lanes_for(torch.device("cpu")) is None
    assert _C.LaneLog().records() == []


def test_more_streams_than_hardware_queues_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from pp_runtime.running.channels.accelerator import warn_of_few_queues

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    ends = dict.fromkeys(range(4))
    with pytest.warns(UserWarning, match="9 streams on cuda:0, which has 8 hardware queues.* Set it to 16"):
        warn_of_few_queues(torch.device("cuda:0"), ends, ends)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_queues(torch.device("cuda:0"), ends, ends)
        warn_of_few_queues(torch.device("cpu"), dict.fromkeys(range(40)), ends)
