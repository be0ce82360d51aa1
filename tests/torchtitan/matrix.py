"""The trainings that run.py compares: schedules times layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

VOCABULARY, SEQUENCE, ROWS = 2048, 64, 8


def ignored(place: int) -> int:
    """How many labels the row at this place of a global batch does without."""
    return 3 * place


TOKENS = sum(SEQUENCE - ignored(place) for place in range(ROWS))

SCHEDULES = (
    "GPipe",
    "1F1B",
    "LoopedBFS",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One training. Every field that is not a layout or a schedule is torchtitan's option of that name."""

    layout: str
    schedule: str = "1F1B"
    pipeline_parallel: int = 1
    data_parallel: int = 1
    replicas: int = 1
    tensor_parallel: int = 1
    accumulated: int = 1
    recompute: str = "none"
    compiled: bool = False
    chunked_loss: bool = False
    backend: str = "partial_dtensor"
    checkpoint: str = "none"
    steps: int = 3

    @property
    def name(self) -> str:
        return self.layout if self.pipeline_parallel == 1 else f"{self.layout}, {self.schedule}"

    @property
    def ranks(self) -> int:
        return self.pipeline_parallel * self.data_parallel * self.replicas * self.tensor_parallel

    @property
    def rows(self) -> int:
        """The rows that one data-parallel rank takes for one step of the schedule."""
        return ROWS // (self.data_parallel * self.replicas * self.accumulated)

    def folder(self) -> str:
        """Where it writes; a resumed run reads what the run before it saved."""
        return "".join(c if c.isalnum() else "-" for c in self.name.replace(" resumed", " saved"))


def runs(version: str) -> Iterator[Run]:
    """All of them for one version of torchtitan, the one that the others are compared with first."""
    new = version.startswith("0.3")
    yield Run("one rank")
    if new:
        yield Run("one rank chunked loss", chunked_loss=True)
    pp = Run("pp 2", pipeline_parallel=2)
    layouts = [
        pp,
        replace(pp, layout="pp 2 full recompute", recompute="full"),
        replace(pp, layout="pp 2 selective recompute", recompute="selective"),
        replace(pp, layout="pp 2 compiled", compiled=True),
        replace(pp, layout="pp 2 saved", checkpoint="saved"),
        replace(pp, layout="pp 2 resumed", checkpoint="resumed"),
    ]
    layouts.append(replace(pp, layout="pp 2 accumulated", accumulated=2))
    if new:
        layouts.append(replace(pp, layout="pp 2 chunked loss", chunked_loss=True))
    four = [
        replace(pp, layout="pp 2 fsdp 2", data_parallel=2),
        replace(pp, layout="pp 2 tp 2", tensor_parallel=2),
        replace(pp, layout="pp 2 fsdp 2 accumulated", data_parallel=2, accumulated=2),
    ]
    if new:
        four.append(replace(four[0], layout="pp 2 fsdp 2 chunked loss", chunked_loss=True))
        four.append(replace(four[1], layout="pp 2 tp 2 full_dtensor", backend="full_dtensor"))
        four.append(replace(pp, layout="pp 2 replicate 2", replicas=2))
    for layout in (*layouts, *four):
        for schedule in SCHEDULES:
            # DualPipeV wants as many microbatches, of one row here, as there are stages.
            if schedule != "DualPipeV" or layout.rows >= 4:
                yield replace(layout, schedule=schedule)
