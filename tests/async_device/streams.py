"""What the device's log says: the same entries as a recording of lanes, read by the same proof, across ranks too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pp_runtime.planning import LaneEntry

COMPUTE = "compute"


def entries_of(records: Iterable[Sequence[Any]]) -> tuple[list[LaneEntry], dict[int, str]]:
    """The log as lane entries, and its streams' names: what is queued on them gives them one.

    Stream 0 computes. A stream that a message is posted from is a send lane or a receive lane; the process group's own
    stream, which carries the message, is named after the lane. Moments from before the log are left out: the device has
    to stand still when a log begins.
    """
    records = list(records)
    marked = {moment for kind, _, moment, *_ in records if kind == "mark"}
    names = {0: COMPUTE}
    for kind, stream, _, text, *_ in records:
        if kind == "work" and text.startswith(("send ", "receive ")):
            lane, verb = int(text.rsplit(" ", 1)[1]), text.split(" ", 1)[0]
            if lane:
                names[lane] = f"{verb} lane {lane}"
            names[stream] = f"{verb} of lane {lane}"
    entries = [
        LaneEntry(kind, names.get(stream, f"stream {stream}"), moment, text, tuple(reads), tuple(writes))
        for kind, stream, moment, text, reads, writes in records
        if kind == "work" or moment in marked
    ]
    return entries, names


def kind_of(lane: str) -> str:
    """A lane's name without its number: what stands for all lanes of its kind."""
    return " ".join(word for word in lane.split() if not word.isdigit())


def across_ranks(logs: Sequence[Sequence[LaneEntry]]) -> list[LaneEntry]:
    """The logs of all ranks as one: a message is received after its sender's stream came to it.

    What a rank's host saw pass is in order before what this host queues later, on any of its lanes; hosts do not share
    what they know. Lanes, memory and events are named by their rank.
    """
    sent = {_message(entry) for log in logs for entry in log if entry.text.startswith("send ")}
    rest = [_of_rank(rank, log) for rank, log in enumerate(logs)]
    waiting: list[list[LaneEntry] | None] = [next(entries, None) for entries in rest]
    merged: list[LaneEntry] = []
    arrived: set[str] = set()
    while any(group is not None for group in waiting):
        before = len(merged)
        for rank, entries in enumerate(rest):
            while (group := waiting[rank]) is not None:
                message = _message(group[-1]) if group[-1].text.startswith("receive ") else None
                if message in sent - arrived:
                    break
                if message in sent:
                    group.insert(0, LaneEntry("wait", group[-1].lane, _event(message), "", (), ()))
                elif group[-1].text.startswith("send "):
                    message = _message(group[-1])
                    group.insert(-1, LaneEntry("mark", group[-1].lane, _event(message), "", (), ()))
                    arrived.add(message)
                merged += group
                waiting[rank] = next(entries, None)
        if len(merged) == before:
            raise ValueError("the logs are not of one run: each waits for a message that no other sends")
    return merged


def _of_rank(rank: int, log: Iterable[LaneEntry]) -> Iterator[list[LaneEntry]]:
    """Each entry under the rank's names, after the waits that stand for what its host knew."""
    known: list[int] = []
    told: dict[str, int] = {}
    for kind, name, moment, text, reads, writes, *_ in log:
        lane, event = f"rank {rank}, {name}", moment * 1000 + rank
        if kind == "passed":
            known.append(event)
            continue
        group = [LaneEntry("wait", lane, seen, "", (), ()) for seen in known[told.get(lane, 0) :]] if text else []
        if text:
            told[lane] = len(known)
        here = (tuple(f"rank {rank}, {memory}" for memory in names) for names in (reads, writes))
        yield [*group, LaneEntry(kind, lane, event, text, *here)]


def _message(entry: LaneEntry) -> str:
    return entry.text.split()[1]


def _event(message: str) -> int:
    return hash(message)
