"""The colour and the words that every picture gives to a kind of action."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pp_runtime.orders import Action, leaves
from pp_runtime.pictures.spans import Span, Spans


@dataclass(frozen=True, slots=True)
class Look:
    """How one kind of action is shown: colours of the first and of the last stage of a rank, terminal colour, words."""

    shades: tuple[str, str]
    terminal: int  # of the 256 colours
    words: str

    def shade(self, place: float = 0.0) -> str:
        """The colour ``place`` of the way from a rank's first stage, 0, to its last, 1."""
        first, last = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in self.shades)
        return "#" + "".join(f"{round(a + (b - a) * place):02x}" for a, b in zip(first, last, strict=True))


# Of Okabe and Ito's hues, light enough for dark numbers, and so apart in lightness that no kind of colour blindness
# makes two of F, B, I and W alike (tests/pictures/test_palette.py).
LOOKS: Mapping[str, Look] = {
    "F": Look(("#6cb0e6", "#b8d9f6"), 75, "F forward"),
    "B": Look(("#109d64", "#5ec78f"), 35, "B full backward"),
    "I": Look(("#dfa71a", "#f7dc7e"), 178, "I backward for inputs"),
    "W": Look(("#cc6a96", "#eba6c4"), 175, "W backward for weights"),
    "OVERLAP_F_B": Look(("#e0702a", "#e0702a"), 172, "forward and backward overlapped"),
    "UNSHARD": Look(("#b08968", "#b08968"), 248, "unshard"),
    "RESHARD": Look(("#d9c2a9", "#d9c2a9"), 252, "reshard"),
    "REDUCE_GRAD": Look(("#8c6d4f", "#8c6d4f"), 245, "reduce gradients"),
    "SEND_F": Look(("#5f6b7a", "#5f6b7a"), 117, "send"),
    "SEND_B": Look(("#5f6b7a", "#5f6b7a"), 117, "send"),
    "RECV_F": Look(("#a3b1bf", "#a3b1bf"), 159, "receive"),
    "RECV_B": Look(("#a3b1bf", "#a3b1bf"), 159, "receive"),
}
WAITING = "#e6e6e6"
INK = "#16202b"  # of the numbers in bars
COMMUNICATION = frozenset({"SEND_F", "SEND_B", "RECV_F", "RECV_B"})


def stage_places(timelines: Iterable[Spans]) -> dict[int, float]:
    """For each stage its place among the stages of its rank, from 0 for the first to 1 for the last."""
    held: dict[int, set[int]] = {}
    for timeline in timelines:
        for span in timeline.spans:
            for part in leaves((span.parsed(),)):
                held.setdefault(span.rank, set()).add(part.stage_index)
    return {
        stage: place / max(1, len(stages) - 1) for stages in held.values() for place, stage in enumerate(sorted(stages))
    }


def legend(timelines: Iterable[Spans], places: Mapping[int, float]) -> dict[str, tuple[str, ...]]:
    """For each thing that needs words its colour, or the first and the last of its shades."""
    spans = [span for timeline in timelines for span in timeline.spans]
    kinds = {part.computation_type.value for span in spans for part in leaves((span.parsed(),))}
    items: dict[str, tuple[str, ...]] = {LOOKS[kind].words: (LOOKS[kind].shade(),) for kind in LOOKS if kind in kinds}
    if max(places.values(), default=0) > 0:
        items["lighter: a rank's later stages"] = LOOKS["F"].shades
    if any(span.waited > 0 for span in spans):
        items["waiting for a message"] = (WAITING,)
    return items


def microbatch_label(action: Action) -> str:
    """What stands in the bar of an action that is no overlap: its microbatch."""
    return "" if action.microbatch_index is None else str(action.microbatch_index)


def action_label(span: Span, several_stages: bool) -> str:
    """What stands in the terminal: ``F3``, or ``2F3`` where ranks have several stages."""
    if span.kind == "OVERLAP_F_B":
        return span.action[1:].partition(")")[0]
    return span.action if several_stages else span.action.lstrip("0123456789")
