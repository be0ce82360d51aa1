"""How much memory the messages of a step take on each rank: worked out from the plan, or as the first step had it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pp_runtime.orders import Action, Edge, ir, leaves

if TYPE_CHECKING:
    from pp_runtime.planning.plan import Plan, Wiring


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes of one microbatch on one edge: the activations, and the gradients that come back for them."""

    activation: int
    gradient: int


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of messages (or buffers, or inputs) and their bytes."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.count + other.count, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What one rank's messages need at most during a step.

    ``activations`` and ``gradients`` are the slots for what it receives, with their bytes. ``kept_inputs`` is the most
    stage inputs, received or handed over by a stage of the same rank, that wait for their backward at once: what
    autograd may keep, most of which lies in the slots. ``torch_buffers`` is what torch.distributed.pipelining holds in
    their place, a buffer a microbatch a stage a direction, and ``torch_sent`` what it has sent and keeps until the step
    ends.
    """

    rank: int
    activations: Amount
    gradients: Amount
    kept_inputs: Amount
    torch_buffers: Amount
    torch_sent: Amount


@dataclass(frozen=True)
class MemoryReport:
    """The messages' memory on each rank. ``str`` shows it as a table."""

    num_microbatches: int
    ranks: tuple[RankMemory, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells as text, its heads first."""
        rows = [("rank", *_COLUMNS.values())]
        for row in self.ranks:
            amounts = [getattr(row, name) for name in _COLUMNS]
            rows.append((str(row.rank), *(f"{each.count} ({human(each.bytes)})" for each in amounts)))
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{row[0]:>4}" + "".join(f"{cell:>21}" for cell in row[1:]) for row in self.rows())


_COLUMNS = {
    "activations": "activation slots",
    "gradients": "gradient slots",
    "kept_inputs": "inputs kept",
    "torch_buffers": "torch's buffers",
    "torch_sent": "torch keeps sent",
}


def human(count: int) -> str:
    """Bytes with three digits and a unit."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def plan_memory(
    plan: Plan, loads: Mapping[Edge, Load], ranks: Iterable[int] | None = None, *, torch_keeps_sent: bool = True
) -> MemoryReport:
    """The report of a plan whose microbatches have these loads; of these ranks, or of all.

    The loads of all edges that begin or end on those ranks are read. ``torch_keeps_sent`` is False for the one schedule
    of torch's, 1F1B, that waits for each of its sends.
    """
    room = plan.credits()
    order = plan.with_communication
    return MemoryReport(
        plan.num_microbatches,
        tuple(
            _rank_memory(plan, loads, room, rank, order[rank], torch_keeps_sent)
            for rank in (sorted(order) if ranks is None else ranks)
        ),
    )


def _rank_memory(
    plan: Plan,
    loads: Mapping[Edge, Load],
    room: Mapping[Any, int],
    rank: int,
    actions: Sequence[Action],
    torch_keeps_sent: bool,
) -> RankMemory:
    trained = {stage for stage, kind, _, _ in leaves(actions) if kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_WEIGHT}
    slots = {False: Amount(), True: Amount()}
    for channel, credits in room.items():
        if channel.receiver == rank and (channel.source in trained or not channel.backward):
            load = loads[Edge(channel.source, channel.destination)]
            slots[channel.backward] += Amount(
                credits, credits * (load.gradient if channel.backward else load.activation)
            )
    held = {stage for stage, holder in enumerate(plan.placement) if holder == rank}
    buffers = sent = Amount()
    for edge in plan.wiring.edges:
        remote = plan.placement[edge.source] != plan.placement[edge.destination]
        if edge.destination in held:
            buffers += Amount(1, loads[edge].activation)
            if remote and edge.destination in trained:
                sent += Amount(1, loads[edge].gradient)
        if edge.source in held:
            if edge.source in trained:
                buffers += Amount(1, loads[edge].gradient)
            if remote:
                sent += Amount(1, loads[edge].activation)
    return RankMemory(
        rank,
        activations=slots[False],
        gradients=slots[True],
        kept_inputs=_peak_inputs(actions, {stage: _input_of(stage, plan.wiring, loads) for stage in held}, trained),
        torch_buffers=_times(buffers, plan.num_microbatches),
        torch_sent=_times(sent, plan.num_microbatches) if torch_keeps_sent else Amount(),
    )


def _times(amount: Amount, factor: int) -> Amount:
    return Amount(amount.count * factor, amount.bytes * factor)


def _input_of(stage: int, wiring: Wiring, loads: Mapping[Edge, Load]) -> Amount:
    """One microbatch's input, all edges together; nothing for a stage that is given the user's own."""
    loads_in = [loads[edge].activation for edge in wiring.edges if edge.destination == stage]
    return Amount(1, sum(loads_in)) if loads_in else Amount()


def _peak_inputs(actions: Sequence[Action], inputs: Mapping[int, Amount], trained: set[int]) -> Amount:
    """The most inputs, and the most bytes of them, between a forward and the B or W of the same stage at one time."""
    count = size = most = largest = 0
    for stage, kind, _, _ in leaves(actions):
        if kind is ir.FORWARD:
            count, size = count + inputs[stage].count, size + inputs[stage].bytes
            most, largest = max(most, count), max(largest, size)
        if kind is ir.FULL_BACKWARD or kind is ir.BACKWARD_WEIGHT or (kind is ir.FORWARD and stage not in trained):
            count, size = count - inputs[stage].count, size - inputs[stage].bytes
    return Amount(most, largest)
