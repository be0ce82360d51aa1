"""The colour and the words that every picture gives to a kind of action."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


LOOKS: Mapping[str, Look] = {
    "F": Look(("#5b8fd6", "#a9c8f0"), 75, "F forward"),
    "B": Look(("#3fa37c", "#9bd6bd"), 78, "B full backward"),
    "I": Look(("#e0a13a", "#f3d08f"), 215, "I backward for inputs"),
    "W": Look(("#a678c8", "#d5bbe8"), 183, "W backward for weights"),
    "OVERLAP_F_B": Look(("#d0607a", "#eba9b8"), 211, "forward and backward overlapped"),
    "UNSHARD": Look(("#8a8f98", "#8a8f98"), 248, "unshard"),
    "RESHARD": Look(("#b9bdc4", "#b9bdc4"), 252, "reshard"),
    "REDUCE_GRAD": Look(("#6b7079", "#6b7079"), 245, "reduce gradients"),
    "SEND_F": Look(("#7fc4d8", "#7fc4d8"), 117, "send"),
    "SEND_B": Look(("#7fc4d8", "#7fc4d8"), 117, "send"),
    "RECV_F": Look(("#c9e7ef", "#c9e7ef"), 159, "receive"),
    "RECV_B": Look(("#c9e7ef", "#c9e7ef"), 159, "receive"),
}
WAITING = "#e6e6e6"
COMMUNICATION = frozenset({"SEND_F", "SEND_B", "RECV_F", "RECV_B"})


def stage_places(timelines: Iterable[Spans]) -> dict[int, float]:
    """For each stage its place among the stages of its rank, from 0 for the first to 1 for the last."""
    held: dict[int, set[int]] = {}
    for timeline in timelines:
        for span in timeline.spans:
            action = span.parsed()
            for part in action.sub_actions or (action,):
                held.setdefault(span.rank, set()).add(part.stage_index)
    return {
        stage: place / max(1, len(stages) - 1) for stages in held.values() for place, stage in enumerate(sorted(stages))
    }


def microbatch_label(span: Span) -> str:
    """What stands in a bar: the microbatch, or the pair of an overlap."""
    action = span.parsed()
    numbers = [part.microbatch_index for part in action.sub_actions or (action,)]
    return "/".join("" if number is None else str(number) for number in numbers)


def action_label(span: Span, several_stages: bool) -> str:
    """What stands in the terminal: ``F3``, or ``2F3`` where ranks have several stages."""
    if span.kind == "OVERLAP_F_B":
        return span.action[1:].partition(")")[0]
    return span.action if several_stages else span.action.lstrip("0123456789")
