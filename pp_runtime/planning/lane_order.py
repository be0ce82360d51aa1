"""Proves from a recording of lanes that no memory is written before its readers are done, or read before its writer.

A lane does its work in order. Work of different lanes is ordered only by a mark on the one and a wait for it on the
other, or by a host that saw the mark pass before it queued more. Each lane, and the host, has a vector clock: how much
of every lane's work is done for certain when its next work begins.

    lane A   write x | mark 1                      A: 1
    lane B                   wait 1 | read x       B's clock holds A: 1, so the read is after the write

Ranks that write into each other's memory have numbers that a lane of one sets and a lane of another waits for. Their
recordings are merged by time: a lane that was made to wait before the number's setting was queued could wait for ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Begins the names of what several ranks use.
SHARED = "shared "


class LaneEntry(NamedTuple):
    """One thing asked of a device, at a time in nanoseconds.

    ``kind`` is work, mark, wait, passed (the host learned that an event has), or, of a number that ranks share and
    ``text`` names, signal (a lane sets it to ``event``) and await (a lane waits until it is). ``rank`` tells the hosts
    of several recordings in one apart.
    """

    kind: str
    lane: str
    event: Hashable
    text: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    time: int = 0
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Access:
    """Work number ``number`` of a lane, which reads or writes some memory."""

    lane: str
    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Race:
    """Two uses of one memory, one of them a write, that nothing puts in order."""

    memory: str
    earlier: Access
    later: Access

    def __str__(self) -> str:
        return (
            f"'{self.later.text}' on lane '{self.later.lane}' does not wait for '{self.earlier.text}' on lane "
            f"'{self.earlier.lane}', and both use '{self.memory}'"
        )


Clock = dict[str, int]


@dataclass(slots=True)
class _Memory:
    written: Access | None = None
    read: list[Access] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Unsent:
    """A lane that was made to wait for a number before anybody was asked to set it: it could wait for ever."""

    number: str
    value: Hashable
    lane: str

    def __str__(self) -> str:
        return f"lane '{self.lane}' waits for '{self.number}' to be {self.value}, which was not queued before"


def merged(recordings: Mapping[int, Sequence[LaneEntry]]) -> list[LaneEntry]:
    """The recordings of the ranks of one host as one, by time; what is not shared gets its rank's name."""

    def of(rank: int, name: str) -> str:
        return name if name.startswith(SHARED) else f"{name}, rank {rank}"

    return sorted(
        (
            entry._replace(
                lane=of(rank, entry.lane),
                event=entry.event if entry.kind in ("signal", "await") else (rank, entry.event),
                reads=tuple(of(rank, name) for name in entry.reads),
                writes=tuple(of(rank, name) for name in entry.writes),
                rank=rank,
            )
            for rank, entries in recordings.items()
            for entry in entries
        ),
        key=lambda entry: entry.time,
    )


def races(entries: Iterable[LaneEntry]) -> list[Race | Unsent]:
    """Every two uses of one memory that nothing puts in order, every wait that could last for ever; none is the proof.

    In the recording of one rank alone, what it waits for of another is not looked at.
    """
    entries = list(entries)
    several = len({entry.rank for entry in entries}) > 1
    clocks: dict[str, Clock] = {}
    marks: dict[Hashable, Clock] = {}
    signals: dict[tuple[str, Hashable], Clock] = {}
    hosts: dict[int, Clock] = {}
    memories: dict[str, _Memory] = {}
    found: list[Race | Unsent] = []
    for entry in entries:
        clock = clocks.setdefault(entry.lane, {})
        host = hosts.setdefault(entry.rank, {})
        if entry.kind == "wait":
            _join(clock, marks[entry.event])
        elif entry.kind == "passed":
            _join(host, marks[entry.event])
        elif entry.kind == "mark":
            marks[entry.event] = dict(clock)
        elif entry.kind == "signal":
            signals[entry.text, entry.event] = dict(clock)
        elif entry.kind == "await":
            if (entry.text, entry.event) in signals:
                _join(clock, signals[entry.text, entry.event])
            elif several:
                found.append(Unsent(entry.text, entry.event, entry.lane))
        else:
            # Whatever the host knew when it queued the work is before it.
            _join(clock, host)
            clock[entry.lane] = clock.get(entry.lane, 0) + 1
            access = Access(entry.lane, clock[entry.lane], entry.text)
            for name in entry.reads:
                memory = memories.setdefault(name, _Memory())
                found += _unordered(name, [memory.written], access, clock)
                memory.read.append(access)
            for name in entry.writes:
                memory = memories.setdefault(name, _Memory())
                found += _unordered(name, [memory.written, *memory.read], access, clock)
                memories[name] = _Memory(written=access)
    return found


def check_lane_order(entries: Sequence[LaneEntry]) -> None:
    """Raise RuntimeError that names every race of a recording."""
    found = races(entries)
    if found:
        raise RuntimeError("the lanes are not in order:\n" + "\n".join(map(str, found)))


def _join(clock: Clock, other: Clock) -> None:
    for lane, number in other.items():
        if clock.get(lane, 0) < number:
            clock[lane] = number


def _unordered(memory: str, earlier: Sequence[Access | None], later: Access, clock: Clock) -> list[Race]:
    return [
        Race(memory, access, later)
        for access in earlier
        if access is not None and clock.get(access.lane, 0) < access.number
    ]
