"""Whether ranks that each run their own actions in sequence all come to the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders import Action, ActionType, Neighbours, Order, Placement, ir
from pp_runtime.planning.verifier.marking import refusal

_SORTS = ("F", "B", "SEND_F", "SEND_B")
_MOST_SHOWN = 4


@dataclass(frozen=True, slots=True)
class _Rule:
    """What one type of action waits for and what it makes known, for each stage.

    An event is a number: its sort's and stage's offset plus the microbatch.
    """

    needs: Sequence[tuple[int, ...]]
    makes: Sequence[int]


class _Events:
    """The numbers of events, sort by sort and stage by stage."""

    def __init__(self, placement: Placement, num_microbatches: int) -> None:
        self.placement = placement
        self.num_microbatches = num_microbatches
        self.total = len(_SORTS) * len(placement) * num_microbatches

    def offset(self, sort: str, stage: int) -> int:
        return (_SORTS.index(sort) * len(self.placement) + stage) * self.num_microbatches

    def offsets(self, sort: str, stages_of: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [tuple(self.offset(sort, stage) for stage in stages) for stages in stages_of]

    def rule(self, sort: str, needs: Sequence[tuple[int, ...]]) -> _Rule:
        return _Rule(needs, [self.offset(sort, stage) for stage in range(len(self.placement))])

    def rank_of(self, event: int) -> int:
        return self.placement[event // self.num_microbatches % len(self.placement)]

    def text(self, event: int) -> str:
        row, microbatch = divmod(event, self.num_microbatches)
        sort, stage = divmod(row, len(self.placement))
        return f"{stage}{_SORTS[sort]}{microbatch}"


def check_progress(order: Order, placement: Placement, num_microbatches: int, around: Neighbours) -> None:
    """Raise InvalidOrderError if compute actions wait for each other in a circle."""
    events = _Events(placement, num_microbatches)
    forward = events.rule("F", events.offsets("F", around.before))
    backward = events.rule("B", events.offsets("B", around.after))
    _run(order, events, {ir.FORWARD: forward, ir.FULL_BACKWARD: backward, ir.BACKWARD_INPUT: backward})


def check_progress_with_sends(order: Order, placement: Placement, num_microbatches: int, around: Neighbours) -> None:
    """Raise InvalidOrderError if actions wait for each other in a circle, messages included.

    A consumer waits for the sends that it receives from, and for what stages on its own rank make. Sends and receives
    themselves do not wait: where both ends of a channel have one sequence, a message moves once both have begun it.
    """
    events = _Events(placement, num_microbatches)
    remote, local = around.on_other_ranks(placement), around.on_same_rank(placement)
    nothing = ((),) * len(placement)
    activations = zip(events.offsets("F", local.before), events.offsets("SEND_F", remote.before), strict=True)
    gradients = zip(events.offsets("B", local.after), events.offsets("SEND_B", remote.after), strict=True)
    forward = events.rule("F", [made + sent for made, sent in activations])
    backward = events.rule("B", [made + sent for made, sent in gradients])
    rules = {ir.FORWARD: forward, ir.FULL_BACKWARD: backward, ir.BACKWARD_INPUT: backward}
    rules[ir.SEND_F], rules[ir.SEND_B] = events.rule("SEND_F", nothing), events.rule("SEND_B", nothing)
    _run(order, events, rules)


def _run(order: Order, events: _Events, rules: Mapping[ActionType, _Rule]) -> None:
    """Let every rank go as far as it can; who waits is woken by the event that it waits for."""
    done = bytearray(events.total)
    place = dict.fromkeys(order, 0)
    waits_for: dict[int, int] = {}
    waiting: dict[int, list[int]] = {}
    needs_of = {kind: rule.needs for kind, rule in rules.items()}
    makes_of = {kind: rule.makes for kind, rule in rules.items()}
    ready = list(order)
    while ready:
        rank = ready.pop()
        actions = order[rank]
        for position in range(place[rank], len(actions)):
            action = actions[position]
            stage, kind, microbatch, parts = action
            missing = None
            if parts is None:
                if kind not in needs_of:
                    continue
                for offset in needs_of[kind][stage]:
                    if not done[offset + microbatch]:  # type: ignore[operator]
                        missing = offset + microbatch  # type: ignore[operator]
                        break
            else:
                missing = _first_missing(parts, needs_of, makes_of, done)
            if missing is not None:
                waits_for[rank] = missing
                waiting.setdefault(missing, []).append(rank)
                place[rank] = position
                break
            for stage, kind, microbatch, _ in parts or (action,):
                if kind in makes_of:
                    event = makes_of[kind][stage] + microbatch  # type: ignore[operator]
                    done[event] = 1
                    if event in waiting:
                        for woken in waiting.pop(event):
                            del waits_for[woken]
                            ready.append(woken)
        else:
            place[rank] = len(actions)
    if waits_for:
        raise InvalidOrderError(_circle(order, events, place, waits_for))


def _first_missing(
    parts: Sequence[Action],
    needs_of: Mapping[ActionType, Sequence[tuple[int, ...]]],
    makes_of: Mapping[ActionType, Sequence[int]],
    done: bytearray,
) -> int | None:
    """An event that the parts wait for before the first of them can begin."""
    made: list[int] = []  # by an earlier part
    for stage, kind, microbatch, _ in parts:
        if kind in needs_of:
            for offset in needs_of[kind][stage]:
                event: int = offset + microbatch  # type: ignore[operator]
                if not done[event] and event not in made:
                    return event
            if len(parts) > 1:
                made.append(makes_of[kind][stage] + microbatch)  # type: ignore[operator]
    return None


def _circle(order: Order, events: _Events, place: Mapping[int, int], waits_for: Mapping[int, int]) -> str:
    """The ranks that wait for each other, each with the place where it stands."""
    seen: list[int] = []
    rank = min(waits_for)
    while rank not in seen:
        seen.append(rank)
        rank = events.rank_of(waits_for[rank])
    circle = seen[seen.index(rank) :]
    lines = []
    for rank in circle[:_MOST_SHOWN]:
        event = waits_for[rank]
        other = events.rank_of(event)
        where = "which stands later on this rank" if other == rank else f"of rank {other}"
        lines.append(refusal(order, rank, place[rank], f"it waits for {events.text(event)}, {where}."))
    if len(circle) > _MOST_SHOWN:
        lines.append(f"and so on through {len(circle)} ranks.")
    return "The order deadlocks.\n" + "\n".join(lines)
