"""How a step that fails ends on this rank: what it tells the others, and what it raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pp_runtime import _C
from pp_runtime.errors import PipelineError
from pp_runtime.running.agreement import Agreement, FailureRecord, RankAbsent

if TYPE_CHECKING:
    from pp_runtime.running.oversight.whereabouts import Lookout

_STORE_LOST = (
    "the process group's store cannot be reached: the process that keeps it has ended (rank 0's, unless torchrun's "
    "agent keeps it)"
)


def end_of_step(
    error: BaseException, place: dict[str, Any], agreement: Agreement | None, lookout: Lookout | None
) -> BaseException:
    """What to raise for an error on this rank, after the other ranks were told of it.

    ``place`` is where this rank was: stage, microbatch and action, empty outside the order. An error of the user's own
    code is raised as it is, with a note; what another rank did to this one is a PipelineError that names it.
    """
    waiting_for = (None if lookout is None else lookout.own().awaited) or "the other ranks"
    if isinstance(error, _C.PeerFailed):
        return FailureRecord.from_text(str(error)).error(waiting_for)
    if agreement is None:
        return error
    by_peer = _caused_by_peer(error, agreement, lookout)
    standing = _publish(by_peer or FailureRecord.of(error, agreement.rank, **place), agreement)
    if by_peer is not None:
        return standing.error(waiting_for)
    if place and not isinstance(error, PipelineError):
        facts = ", ".join(f"{name} {value}" for name, value in place.items() if value is not None)
        note = f"pp_runtime: on rank {agreement.rank}, {facts}"
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:  # Python 3.10 shows no notes, but a program may read them
            vars(error).setdefault("__notes__", []).append(note)
    return error


def _caused_by_peer(error: BaseException, agreement: Agreement, lookout: Lookout | None) -> FailureRecord | None:
    """The record of a rank that was lost or that is late, which cannot make its own."""
    if isinstance(error, _C.StoreLost):
        return FailureRecord(-1, "", f"{_STORE_LOST}: {error}", "")
    if isinstance(error, RankAbsent):
        return FailureRecord(-1 if error.rank is None else error.rank, "", error.reason, "", absent=True)
    if isinstance(error, _C.WaitedTooLong) and lookout is not None:
        culprit = lookout.culprit(error.seconds)
        place = {} if culprit.at is None else culprit.at.place()
        return FailureRecord(
            culprit.rank, "", f"{culprit.story}; the deadline is {agreement.deadline:g} s", "", **place
        )
    if isinstance(error, _C.PeerLost):
        at = None if lookout is None else lookout.find(error.rank)
        if at is None or at.action is None:
            return FailureRecord(error.rank, "", str(error), "")
        if at.known_ago:  # it may have gone on since then
            return FailureRecord(error.rank, "", f"{error}; {at.known_ago:.1f} s before, it was in {at.action}", "")
        return FailureRecord(error.rank, "", f"{error}; it was in {at.action}", "", **at.place())
    return None


def _publish(record: FailureRecord, agreement: Agreement) -> FailureRecord:
    """The record that stands for all ranks: the first one's."""
    try:
        return FailureRecord.from_text(agreement.watch.publish(record.to_text()))
    except _C.StoreLost:
        return record
