"""A wait that the runtime forgets is seen: by wrong numbers, by the proof on the device's log, or it is covered."""

from __future__ import annotations

import pytest

from pp_runtime.planning import LaneEntry
from pp_runtime.planning.lane_order import races
from tests.async_device import device
from tests.async_device.left_out_waits import MICROBATCHES, leave_each_out, table
from tests.async_device.streams import across_ranks, entries_of, kind_of
from tests.helpers import api, ranks
from tests.helpers.pipelines import Setting, Twins, stages_allowed
from tests.running import test_lanes

pytestmark = [api.ours_only("has no lanes of its own"), pytest.mark.timeout(300)]

ARRIVALS = {"receive lane waits for receive of lane", "compute waits for receive lane"}
ALWAYS_NECESSARY = {"send lane waits for compute"} | ARRIVALS


@pytest.mark.parametrize("schedule", ["1F1B", "1F1B:eval"])
def test_a_wait_that_is_left_out_gives_wrong_numbers_or_is_covered(schedule: str) -> None:
    found = leave_each_out(schedule, seed=1)
    told = table(found)
    assert not [one for one in found if one.wrong and not one.raced], f"the proof misses what the numbers show\n{told}"
    necessary = [one for one in found if one.raced]
    assert {one.kind for one in found if not one.raced}.isdisjoint(ALWAYS_NECESSARY), told
    assert {one.kind for one in necessary} >= ALWAYS_NECESSARY, told
    # In a step the next message into a slot depends on what was computed from the last one; in an evaluation not.
    reuse = {bool(one.raced) for one in found if one.kind == "receive lane waits for compute"}
    assert reuse <= {schedule.endswith("eval")}, told
    caught = sum(bool(one.wrong or one.again) for one in necessary)
    assert caught >= 0.75 * len(necessary), told  # 98 of 100, on a machine that is not overloaded


def _log(rank: int, setting: Setting, compute_is_slow: bool = False) -> list[LaneEntry]:
    """The device's log of two steps and an evaluation."""
    sim = device.load()
    device.send_through_communicators()
    if compute_is_slow:
        sim.set_slow_stream(0, 500)
    twins = Twins(rank, setting)
    twins.train("to open the channels", twins.example.batch(2 * setting.microbatches, 0))
    sim.synchronize()
    sim.begin_log()
    for number in range(2):
        assert not twins.train(f"step {number}", twins.example.batch(2 * setting.microbatches, number))
    twins.evaluate("evaluation", twins.example.batch(2 * setting.microbatches, 9))
    return entries_of(sim.end_log())[0]


@pytest.mark.parametrize("schedule", ["1F1B", "InterleavedZeroBubble", "DualPipeV"])
def test_all_memory_of_a_step_is_used_in_order(schedule: str) -> None:
    """Also what our code does not name: autograd's, the allocator's, the user's."""
    logs = device.run(_log, 2, setting=Setting(schedule, 5, stages_allowed(schedule, 2)[-1]))
    assert [races(log) for log in logs] == [[], []]
    assert races(across_ranks(logs)) == []
    assert all(len({name for entry in log for name in entry.reads}) > 10 for log in logs)


def _kinds(entries: list[LaneEntry]) -> set[str]:
    """Which kinds of lanes wait for which, the process group's own streams aside."""
    marks = {entry.event: _short(entry.lane) for entry in entries if entry.kind == "mark"}
    pairs = {(_short(entry.lane), marks[entry.event]) for entry in entries if entry.kind == "wait"}
    return {f"{waiting} waits for {awaited}" for waiting, awaited in pairs if " of" not in waiting + awaited}


def _short(lane: str) -> str:
    return kind_of(lane.split(",")[0]).removesuffix(" lane")


def _recorded(rank: int, setting: Setting) -> list[LaneEntry]:
    return test_lanes._train(rank, setting)[1]


def test_recorded_lanes_and_the_device_ask_for_the_same_waits() -> None:
    setting = Setting("1F1B", MICROBATCHES)
    recorded = ranks.run(_recorded, 2, setting=setting)
    # A slot's reader is waited for only where it is late, as the recorded device always is.
    logged = device.run(_log, 2, delay_us=0, setting=setting, compute_is_slow=True)
    ours, theirs = (set.union(*map(_kinds, logs)) for logs in (logged, recorded))
    assert ours == theirs
    assert len(ours) == 4


def test_messages_put_the_logs_of_ranks_in_order() -> None:
    def work(lane: str, text: str, reads: str = "", writes: str = "") -> LaneEntry:
        return LaneEntry("work", lane, 0, text, tuple(reads.split()), tuple(writes.split()))

    sender = [work("send of lane 1", "send a from stream 1", reads="x")]
    receiver = [work("receive of lane 2", "receive a from stream 2", writes="y"), work("compute", "add", reads="y")]
    assert [entry.kind for entry in across_ranks([sender, receiver])] == ["mark", "work", "wait", "work", "work"]
    assert len(races(across_ranks([sender, receiver]))) == 1  # the sum waits for nothing
    circle = [
        [work("b", "receive b from stream 2"), work("a", "send a from stream 1")],
        [work("a", "receive a from stream 2"), work("b", "send b from stream 1")],
    ]
    with pytest.raises(ValueError, match="not of one run"):
        across_ranks(circle)
