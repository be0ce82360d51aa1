"""Which schedule would win: all of them, simulated on one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pp_runtime.orders import ORDERS, Order, OrderSpec
from pp_runtime.planning.search.shortest_order import auto
from pp_runtime.timing import Costs, Timeline, simulate


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule in a comparison.

    ``activations`` is the peak of the fullest rank, in microbatches of an even share of the model: 1 is what one
    microbatch keeps in all stages of one rank, so that 1F1B has the number of ranks whatever its stages are.
    """

    name: str
    num_stages: int
    makespan: float
    bubble: float
    activations: float
    slots: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """The schedules that a setting allows, shortest first, and why the others do not."""

    rows: tuple[Row, ...]
    refused: dict[str, str]

    @property
    def winner(self) -> Row:
        """The shortest, and of those the one with the fewest activations."""
        return self.rows[0]

    def table(self) -> str:
        """The rows as aligned text, then a sentence about the winner."""
        heads = ("schedule", "stages", "makespan", "bubble", "activations", "slots")
        cells = [
            (
                row.name,
                str(row.num_stages),
                f"{row.makespan:.4g}",
                f"{row.bubble:.1%}",
                f"{row.activations:.3g}",
                str(row.slots),
            )
            for row in self.rows
        ]
        lines = aligned([heads, *cells])
        lines += ["", self.verdict()]
        lines += [f"{name} is left out: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)

    def verdict(self) -> str:
        """What the comparison says, in a sentence."""
        named = [row for row in self.rows if row.name != "Auto"]
        best, base = named[0], next((row for row in self.rows if row.name == "1F1B"), named[-1])
        if best.makespan >= base.makespan * (1 - 1e-9):
            text = f"No named schedule would be shorter than {base.name}"
        else:
            saved = 1 - best.makespan / base.makespan
            text = f"{best.name} would be the shortest named schedule, {saved:.1%} shorter than {base.name}"
        if self.winner.name == "Auto" and self.winner.makespan < best.makespan * (1 - 1e-9):
            text += f"; Auto finds one {1 - self.winner.makespan / best.makespan:.1%} shorter still"
        return text + "."


def compare(
    num_ranks: int,
    num_stages: int,
    num_microbatches: int,
    costs: Costs | None = None,
    *,
    memory_cap: float | None = None,
    with_auto: bool = True,
) -> Comparison:
    """Simulate every training schedule for a model whose ``num_stages`` stages have these costs.

    A schedule that needs another number of stages a rank gets the same model cut otherwise: neighbouring stages as one,
    or each stage in equal pieces. ``memory_cap`` leaves out schedules with more activations (as :class:`Row` counts).
    ValueError if no schedule is left, and for counts below 1 and costs of fewer stages.
    """
    costs = costs or Costs()
    _refuse_for_all(num_ranks, num_stages, num_microbatches, costs)
    rows: list[Row] = []
    refused: dict[str, str] = {}
    for name, spec in ORDERS.items():
        if spec.forward_only or name == "Auto":
            continue
        stages = _stages_for(spec, num_ranks, num_stages)
        try:
            order = spec.build(num_ranks, stages, num_microbatches)
            row = _row(name, order, num_ranks, stages, costs.recut(num_stages, stages))
        except ValueError as error:
            refused[name] = str(error)
            continue
        if memory_cap is None or row.activations <= memory_cap:
            rows.append(row)
        else:
            refused[name] = f"it keeps {row.activations:.3g} activations, over the cap of {memory_cap:.3g}."
    if with_auto:
        try:
            rows.append(_auto_row(num_ranks, num_stages, num_microbatches, costs, memory_cap))
        except ValueError as error:
            refused["Auto"] = str(error)
    if not any(row.name != "Auto" for row in rows):
        raise ValueError(
            "No schedule fits: " + "; ".join(f"{name}: {reason}" for name, reason in refused.items()).rstrip(".") + "."
        )
    return Comparison(tuple(sorted(rows, key=lambda row: (row.makespan, row.activations, row.name))), refused)


def compare_measured(timeline: Timeline, num_microbatches: int | None = None) -> Comparison:
    """Compare for the model, ranks and microbatches of a measured timeline that :meth:`Timeline.gather` made."""
    costs = timeline.costs()
    found = {part for span in timeline.spans for part in (span.parsed().sub_actions or (span.parsed(),))}
    microbatches = 1 + max(part.microbatch_index or 0 for part in found)
    return compare(len(timeline.ranks), timeline.num_stages, num_microbatches or microbatches, costs)


def _refuse_for_all(num_ranks: int, num_stages: int, num_microbatches: int, costs: Costs) -> None:
    """Say once what every schedule would refuse."""
    for count, what in ((num_ranks, "ranks"), (num_stages, "stages"), (num_microbatches, "microbatches")):
        if count < 1:
            raise ValueError(f"The comparison got {count} {what}; give at least 1.")
    costs.table(num_stages)
    costs.by_stage("transfer", num_stages)


def _stages_for(spec: OrderSpec, num_ranks: int, num_stages: int) -> int:
    allowed = spec.stages_per_rank_allowed
    if allowed is None or any(num_stages == number * num_ranks for number in allowed):
        return num_stages
    return allowed[0] * num_ranks


def _row(name: str, order: Order, num_ranks: int, num_stages: int, costs: Costs) -> Row:
    played = simulate(order, costs)
    activations = max(played.activations.values()) * num_ranks / num_stages
    return Row(name, num_stages, played.makespan, played.bubble, activations, max(played.slots.values()))


def _auto_row(num_ranks: int, num_stages: int, num_microbatches: int, costs: Costs, memory_cap: float | None) -> Row:
    """Auto's best with the given stages, or with one or two stages a rank."""
    rows = []
    for stages in sorted({num_stages, num_ranks, 2 * num_ranks}):
        try:
            recut = costs.recut(num_stages, stages)
            cap = None if memory_cap is None else int(memory_cap * stages / num_ranks + 1e-9)
            order = auto(num_ranks, stages, num_microbatches, recut, cap)
        except ValueError:
            if stages == num_stages:
                raise
            continue
        rows.append(_row("Auto", order, num_ranks, stages, recut))
    return min(rows, key=lambda row: (row.makespan, row.activations))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return lines
