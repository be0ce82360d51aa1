"""Proves from a recording of lanes that no memory is written before its readers are done, or read before its writer.

A lane does its work in order. Work of different lanes is ordered only by a mark on the one and a wait for it on the
other, or by a host that saw the mark pass before it queued more. Each lane, and the host, has a vector clock: how much
of every lane's work is done for certain when its next work begins.

    lane A   write x | mark 1                      A: 1
    lane B                   wait 1 | read x       B's clock holds A: 1, so the read is after the write
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class LaneEntry(NamedTuple):
    """One thing asked of a device: ``kind`` is work, mark, wait, or passed (the host learned that an event has)."""

    kind: str
    lane: str
    event: int
    text: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


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


def races(entries: Iterable[LaneEntry]) -> list[Race]:
    """Every two uses of one memory that nothing puts in order; none is the proof."""
    clocks: dict[str, Clock] = {}
    marks: dict[int, Clock] = {}
    host: Clock = {}
    memories: dict[str, _Memory] = {}
    found: list[Race] = []
    for entry in entries:
        clock = clocks.setdefault(entry.lane, {})
        if entry.kind == "wait":
            _join(clock, marks[entry.event])
        elif entry.kind == "passed":
            _join(host, marks[entry.event])
        elif entry.kind == "mark":
            marks[entry.event] = dict(clock)
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
