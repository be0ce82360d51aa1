"""Where each rank is, and who waits for whom: asked for when a wait was too long or a rank was lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pp_runtime import _C

if TYPE_CHECKING:
    from pp_runtime.running.agreement import Agreement

# Operations of csrc/oversight/operation.h, then the two states of csrc/oversight/whereabouts.h.
_TEXTS = ("F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "HAND_F", "HAND_B")
_SENDS, _RECEIVES = {4: "SEND_F", 6: "SEND_B"}, {5: "SEND_F", 7: "SEND_B"}
_CALL, _OUTSIDE_STEP, _END_OF_STEP = 10, 11, 12

# A rank that nobody can look at tells the store where it is after this part of the deadline, or this many seconds.
_PATIENCE, _LONGEST_PATIENCE = 0.25, 5.0


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What a rank is doing, and for how many seconds. ``peer`` is the rank it sends to or receives from.

    ``known_ago`` is how many seconds before now this was known: 0 where its board can be read.
    """

    operation: int = _OUTSIDE_STEP
    stage: int = -1
    microbatch: int = -1
    peer: int = -1
    other_stage: int = -1
    seconds: float = 0.0
    name: str = ""
    known_ago: float = 0.0

    @property
    def action(self) -> str | None:
        """The action's text, ``1B4``; None outside the order."""
        if self.operation == _CALL:
            return self.name
        return f"{self.stage}{_TEXTS[self.operation]}{self.microbatch}" if self.operation < len(_TEXTS) else None

    @property
    def ends_step(self) -> bool:
        """Whether the rank did its part of the step and waits for the others."""
        return self.operation == _END_OF_STEP

    @property
    def awaited(self) -> str | None:
        """What a rank that is here may be waiting for; None where it waits for nobody."""
        if self.operation in _RECEIVES:
            return f"{self.other_stage}{_RECEIVES[self.operation]}{self.microbatch} from rank {self.peer}"
        if self.operation in _SENDS:
            return f"rank {self.peer} to take {self.action}"
        return "the other ranks to finish the step" if self.ends_step else None

    def place(self) -> dict[str, Any]:
        """Stage, microbatch and action, None where there is none."""
        return {
            "stage": self.stage if self.stage >= 0 else None,
            "microbatch": self.microbatch if self.microbatch >= 0 else None,
            "action": self.action,
        }

    def __str__(self) -> str:
        known = f", as it told {self.known_ago:.1f} s ago" if self.known_ago else ""
        if self.operation == _OUTSIDE_STEP:
            return f"has been outside step() for {self.seconds:.1f} s{known}"
        if self.ends_step:
            return f"did its part of the step {self.seconds:.1f} s ago{known}"
        if self.awaited is not None:
            return f"has waited {self.seconds:.1f} s for {self.awaited}{known}"
        return f"has been in {self.action} for {self.seconds:.1f} s{known}"


@dataclass(frozen=True, slots=True)
class Culprit:
    """The rank that a chain of waits ends at, where it is, and the chain in words."""

    rank: int
    at: Whereabouts | None
    story: str


class Lookout:
    """Finds ranks: on the board that all share, or by what their reporters told the store."""

    def __init__(self, agreement: Agreement, board: _C.Board, *, shared: bool) -> None:
        self._agreement = agreement
        self._shared = shared
        self.board = board
        self._reporter = None if shared else agreement.reporter(board, _patience(agreement.deadline))

    def find(self, rank: int) -> Whereabouts | None:
        """Where a rank is; None where nothing is known of it."""
        if self._shared or rank == self._agreement.rank:
            operation, stage, microbatch, peer, other_stage, seconds, name = self.board.read(rank)
            text = name.decode(errors="replace")
            return Whereabouts(operation, stage, microbatch, peer, other_stage, seconds, text)
        return _from_report(self._agreement.report_of(rank))

    def deadline_changed(self) -> None:
        """Have this rank's reporter speak in time for the agreement's new deadline."""
        if self._reporter is not None:
            self._reporter.set_patience(_patience(self._agreement.deadline))

    def step_ended(self) -> None:
        """Have what was told of the step taken back, so that nobody is blamed for where it was."""
        if self._reporter is not None:
            self._reporter.end_step()

    def own(self) -> Whereabouts:
        """Where this rank is."""
        return self.find(self._agreement.rank) or Whereabouts()

    def culprit(self, waited: float) -> Culprit:
        """Who holds up this rank, which waited for so many seconds."""
        pids = self._agreement.pids
        return follow_waits(self._agreement.rank, self._agreement.size, waited, self.find, lambda r: _stopped(pids, r))


def follow_waits(
    rank: int,
    size: int,
    waited: float,
    find: Callable[[int], Whereabouts | None],
    stopped: Callable[[int], str],
) -> Culprit:
    """Follow the waits from ``rank`` to the one that waits for nobody, or whose process is stopped."""
    at = find(rank)
    story = f"rank {rank} waited {waited:.1f} s for {_awaited(rank, at, size, find)}"
    seen = {rank}
    while at is not None and not stopped(rank):
        following = _waits_for(rank, at, size, find)
        if following is None or following in seen:
            break
        seen.add(following)
        rank, at = following, find(following)
        story += f", which {at}" if at is not None else ", of which nothing is known"
        if at is not None and at.ends_step:
            story += f" and waits for {_awaited(rank, at, size, find)}"
        story += stopped(rank)
    return Culprit(rank, at, story)


def _waits_for(rank: int, at: Whereabouts, size: int, find: Callable[[int], Whereabouts | None]) -> int | None:
    if at.operation in _SENDS or at.operation in _RECEIVES:
        return at.peer if 0 <= at.peer < size else None
    if not at.ends_step:
        return None
    others = ((other, find(other)) for other in range(size) if other != rank)
    return next((other for other, place in others if place is not None and not place.ends_step), None)


def _awaited(rank: int, at: Whereabouts | None, size: int, find: Callable[[int], Whereabouts | None]) -> str:
    if at is None or at.awaited is None:
        return "another rank"
    following = _waits_for(rank, at, size, find) if at.ends_step else None
    return at.awaited if following is None else f"rank {following} to finish the step"


def _patience(deadline: float) -> float:
    return min(_PATIENCE * deadline, _LONGEST_PATIENCE)


def _from_report(report: str) -> Whereabouts | None:
    """From what csrc/oversight/whereabouts.cpp's Reporter wrote: five numbers, since when and when, and a name."""
    fields = report.split(" ", 7)
    try:
        operation, stage, microbatch, peer, other_stage = map(int, fields[:5])
        since, told, name = float(fields[5]), float(fields[6]), fields[7]
        # Another host's clock may be ahead.
        ago = max(0.1, time.time() - told)
        return Whereabouts(operation, stage, microbatch, peer, other_stage, told - since, name, ago)
    except (ValueError, IndexError):
        return None


def _stopped(pids: dict[int, int], rank: int) -> str:
    """Says so where a rank's process, on this host, is stopped; else empty."""
    if rank not in pids:
        return ""
    try:
        with open(f"/proc/{pids[rank]}/stat") as stat:
            state = stat.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return f" (its process, pid {pids[rank]}, is stopped)" if state in "tT" else ""
