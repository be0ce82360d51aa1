"""Leaves out each wait of a step in turn, and says who notices: the numbers, and the proof on the device's own log.

    python -m tests.async_device.left_out_waits 1F1B ZBVZeroBubble 1F1B:eval --seeds 3

A wait is *necessary* where the ranks' logs have two uses of one memory that nothing else puts in order (vector clocks,
pp_runtime/planning/lane_order.py). One that is not is covered: by another wait, by what the host had seen, or by a
message, which no rank sends before it has what the message depends on. A rank's own log does not show the last and asks
for more waits (*on its rank*). A necessary wait that was left out is *caught* where losses, outputs or gradients are
wrong on any rank, with streams delayed at random; if they are not it is left out once more, with that stream slow whose
work it waits for. The rest had luck.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pp_runtime.planning import LaneEntry
from pp_runtime.planning.lane_order import Race, races
from tests.async_device import device
from tests.async_device.streams import COMPUTE, across_ranks, entries_of, kind_of
from tests.helpers import reference
from tests.helpers.pipelines import Setting, Twins, backward_orders, stages_allowed, step

RANKS = 2
MICROBATCHES = 5
STEPS = 2  # the wait is left out in the first; what it spoils may show in the next
SLOW_US = 1000


@dataclass(frozen=True)
class LeftOut:
    """A wait that was left out once."""

    rank: int
    number: int
    waiting: str
    awaited: str
    wrong: tuple[str, ...]  # what differed from the plain model, on any rank
    raced: tuple[str, ...]  # what was out of order, all ranks' logs together
    raced_alone: tuple[str, ...]  # the same in the log of the rank that left it out
    again: tuple[str, ...] = ()  # what was wrong when it was left out with a stream slow, if nothing was before

    @property
    def kind(self) -> str:
        return f"{kind_of(self.waiting)} waits for {kind_of(self.awaited)}"


@dataclass(frozen=True)
class _Trial:
    """What one rank saw of two steps."""

    left_out: tuple[int, int, int] | None  # the streams of the wait that was left out, its number between them
    lanes: tuple[str, str]
    wrong: list[str]
    entries: list[LaneEntry]


class _Trials:
    """One rank's pipeline, which takes the same two steps again and again."""

    def __init__(self, rank: int, setting: Setting, method: str, delay_us: int, seed: int) -> None:
        self.method = method
        self.rank, self.delay_us, self.seed = rank, delay_us, 1000 * seed + rank
        self.sim = device.load()
        device.send_through_communicators()  # whose streams the log knows
        self.twins = Twins(rank, setting)
        self.names: dict[int, str] = {0: COMPUTE}
        # Steps differ, or what a slot held before would be right.
        self.batches = [self.twins.example.batch(2 * setting.microbatches, number) for number in range(STEPS)]
        self.expected = [self._plain(batch) for batch in self.batches]

    def run(self, left_out: int | tuple[int, int, int], slow_stream: int | None = None) -> _Trial:
        """Leave out a wait in the first of the steps, by its number (-1 for none) or its number between two streams.

        With a slow stream (-1 for none) the others have no delays.
        """
        self.sim.synchronize()
        dist.barrier()
        self.sim.set_slow_stream(-1 if slow_stream is None else slow_stream, SLOW_US)
        self.sim.set_delays(self.delay_us if slow_stream is None else 0, 3, self.seed)
        self.sim.begin_log()
        if isinstance(left_out, int):
            self.sim.leave_out_wait(left_out)
        else:
            self.sim.leave_out_wait_between(*left_out)
        outcomes = []
        streams = None
        for batch in self.batches:
            for module in self.twins.mine.values():
                module.zero_grad()
            outcomes.append((self._step(batch), self._gradients()))
            if streams is None:
                streams = self.sim.left_out()
                self.sim.leave_out_wait(-1)
        wrong = [line for place, outcome in enumerate(outcomes) for line in self._wrong(place, *outcome)]
        entries, names = entries_of(self.sim.end_log())
        self.names |= names
        assert streams is not None
        lanes = (self._name(streams[0]), self._name(streams[1]))
        return _Trial(streams if streams[0] >= 0 else None, lanes, wrong, entries)

    def stream_of(self, lane: str) -> int:
        """The stream of a lane of this rank, -1 where it is another's."""
        rank, name = lane.split(", ", 1)
        return (
            next((stream for stream, known in self.names.items() if known == name), -1)
            if rank == f"rank {self.rank}"
            else -1
        )

    def _step(self, batch: reference.Batch) -> reference.Outcome:
        return step(self.twins.schedule, self.twins.stages, batch, self.method)

    def _name(self, stream: int) -> str:
        return self.names.get(stream, f"stream {stream}")

    def _plain(self, batch: reference.Batch) -> tuple[reference.Outcome, dict[int, list[Any]]]:
        example, orders = self.twins.example, backward_orders(self.twins.schedule)
        count = self.twins.setting.microbatches
        if self.method == "eval":
            return reference.evaluate(example.stages, batch, count, example.loss_fn), {}
        outcome = reference.train_step(example.stages, batch, example.loss_fn, count, orders)
        return outcome, {
            index: [parameter.grad for parameter in self.twins.plain[index].parameters()] for index in self.twins.mine
        }

    def _gradients(self) -> dict[int, list[torch.Tensor]]:
        """Of this step, read by the device itself: nothing waits yet."""
        return {
            index: [parameter.grad.clone() for parameter in module.parameters()]
            for index, module in self.twins.mine.items()
            if self.method == "step"
        }

    def _wrong(self, place: int, got: reference.Outcome, gradients: dict[int, list[torch.Tensor]]) -> list[str]:
        expected, theirs = self.expected[place]
        found = []
        if self.twins.holds_last:
            found += reference.differences(f"step {place} losses", got.losses, expected.losses, exact=False)
            found += reference.differences(f"step {place} output", got.outputs, expected.outputs, exact=False)
        for index, mine in gradients.items():
            where = f"step {place}, stage {index}, gradients"
            found += reference.differences(where, mine, theirs[index], exact=False)
        return [f"rank {self.rank}: {line}" for line in found]


def _try_each(rank: int, setting: Setting, method: str, delay_us: int, seed: int) -> list[LeftOut]:
    """Every wait of this rank's step, then every one of the next rank's; what is known to all ranks."""
    trials = _Trials(rank, setting, method, delay_us, seed)
    trials.run(-1)  # opens the channels
    whole = _shared(trials.run(-1))
    raced = [str(race) for race in _races(whole)]
    if raced or any(trial.wrong for trial in whole):
        raise AssertionError(f"with every wait in its place: {[trial.wrong for trial in whole]} {raced}")
    found: list[LeftOut] = []
    for victim in range(RANKS):
        for number in itertools.count():
            told = _shared(trials.run(number if rank == victim else -1))
            left_out = told[victim].left_out
            if left_out is None:
                break
            raced, wrong, again = _races(told), _wrong(told), ()
            if raced and not wrong:
                # The stream whose work was not waited for is slow, the others are not.
                late = trials.stream_of(raced[0].earlier.lane)
                again = _wrong(_shared(trials.run(left_out if rank == victim else -1, late)))
            alone = tuple(map(str, races(told[victim].entries)))
            found.append(LeftOut(victim, number, *told[victim].lanes, wrong, tuple(map(str, raced)), alone, again))
    return found


def _shared(mine: _Trial) -> list[_Trial]:
    told: list[Any] = [None] * RANKS
    dist.all_gather_object(told, mine)
    return told


def _races(trials: Sequence[_Trial]) -> list[Race]:
    return races(across_ranks([trial.entries for trial in trials]))


def _wrong(trials: Sequence[_Trial]) -> tuple[str, ...]:
    return tuple(line for trial in trials for line in trial.wrong)


def _try_each_of(rank: int, options: tuple[Setting, str, int, int]) -> list[LeftOut]:
    return _try_each(rank, *options)


def leave_each_out(schedule: str, seed: int, delay_us: int = 1500, timeout: float = 60) -> list[LeftOut]:
    """Each wait of a step on two ranks, left out once; of an evaluation where the schedule's name ends in ``:eval``."""
    schedule, _, method = schedule.partition(":")
    setting = Setting(schedule, MICROBATCHES, stages_allowed(schedule, 2)[-1])
    return device.run(_try_each_of, RANKS, timeout, options=(setting, method or "step", delay_us, seed))[0]


def table(found: Sequence[LeftOut]) -> str:
    """How many waits of each kind were left out, were necessary, were caught."""
    heads = ("left out", "on its rank", "necessary", "caught", "slowed", "luck", "caught but covered")
    lines = [" ".join([f"{'':42}", *(f"{head:>9}" for head in heads)])]
    kinds = Counter(one.kind for one in found)
    for kind in [*kinds, "all"]:
        those = [one for one in found if kind in (one.kind, "all")]
        needed = [one for one in those if one.raced]
        caught = sum(bool(one.wrong) for one in needed)
        slowed = sum(bool(one.again) for one in needed)
        strange = sum(bool(one.wrong) for one in those if not one.raced)
        alone = sum(bool(one.raced_alone) for one in those)
        numbers = (len(those), alone, len(needed), caught, slowed, len(needed) - caught - slowed, strange)
        lines.append(" ".join([f"{kind:42}", *(f"{n:{max(9, len(h))}}" for h, n in zip(heads, numbers, strict=True))]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedules", nargs="+")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--delay-us", type=int, default=1500)
    flags = parser.parse_args()
    everything: list[LeftOut] = []
    for schedule in flags.schedules:
        found = [one for seed in range(flags.seeds) for one in leave_each_out(schedule, seed, flags.delay_us, 300)]
        print(f"{schedule}, {flags.seeds} seeds\n{table(found)}", flush=True)
        for one in found:
            if one.raced and not one.wrong and not one.again:
                print(f"  luck: rank {one.rank}, wait {one.number}: {one.kind}: {one.raced[0]}")
            if one.wrong and not one.raced:
                print(f"  strange: rank {one.rank}, wait {one.number}: {one.kind}: {one.wrong[0]}")
        everything += found
    print(f"all\n{table(everything)}")


if __name__ == "__main__":
    main()
