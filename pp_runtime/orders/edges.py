"""Which stage gives tensors to which: a chain, or any graph that goes from lower stages to higher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pp_runtime.orders.ir import Placement


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """Activations go from the source stage to the destination, and gradients back."""

    source: int
    destination: int


def adjacent_edges(num_stages: int) -> tuple[Edge, ...]:
    """The edges of a chain of stages."""
    return tuple(Edge(stage, stage + 1) for stage in range(num_stages - 1))


@dataclass(frozen=True, slots=True)
class Neighbours:
    """For each stage, the stages before it (it gets activations from them) and after it (gradients)."""

    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]

    def on_other_ranks(self, placement: Placement) -> Neighbours:
        """Only those that a message has to reach."""
        return Neighbours(_on_ranks(self.before, placement, False), _on_ranks(self.after, placement, False))

    def on_same_rank(self, placement: Placement) -> Neighbours:
        """Only those that share the stage's rank."""
        return Neighbours(_on_ranks(self.before, placement, True), _on_ranks(self.after, placement, True))


def neighbours(num_stages: int, edges: Iterable[Edge] | None = None) -> Neighbours:
    """Each stage's neighbours along the edges, in order of stage; a chain's without edges.

    ValueError for an edge that does not lead from a lower stage to a higher one of these stages.
    """
    before: list[set[int]] = [set() for _ in range(num_stages)]
    after: list[set[int]] = [set() for _ in range(num_stages)]
    for edge in adjacent_edges(num_stages) if edges is None else edges:
        if not 0 <= edge.source < edge.destination < num_stages:
            raise ValueError(
                f"The edge from stage {edge.source} to stage {edge.destination} does not lead from a lower stage to a "
                f"higher one among {num_stages} stages."
            )
        before[edge.destination].add(edge.source)
        after[edge.source].add(edge.destination)
    return Neighbours(tuple(tuple(sorted(s)) for s in before), tuple(tuple(sorted(s)) for s in after))


def _on_ranks(stages_of: tuple[tuple[int, ...], ...], placement: Placement, same: bool) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(other for other in others if (placement[other] == placement[stage]) is same)
        for stage, others in enumerate(stages_of)
    )
