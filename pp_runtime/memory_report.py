"""How much memory the messages of a step take on each rank: worked out from the plan, or as the first step had it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from .errors import PipelineModeError, PipelineUsageError
from .ir import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD, Action, leaves
from .passes.edges import Edge
from .payload import _normalize_model_output_as_tuple
from .special_tensors import is_dtensor, local_part

if TYPE_CHECKING:
    from .plan import Plan, Wiring
    from .stage import _PipelineStageBase

Tensors = torch.Tensor | Sequence[torch.Tensor]
Signature = Tensors | Mapping[tuple[int, int], Tensors]
"""What one microbatch sends over each edge; one value for all, or one for each ``(source stage, destination stage)``.

Only shapes and dtypes are read, so tensors on the meta device do.
"""


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes of one microbatch on one edge: the activations, and the gradients that come back for them."""

    activation: int
    gradient: int

    @staticmethod
    def of(tensors: Iterable[torch.Tensor], backward: Callable[[torch.Tensor], bool] | None = None) -> Load:
        """Of these tensors; gradients come back for the floating ones, or for those that ``backward`` says."""
        tensors = list(tensors)
        back = backward or (lambda tensor: tensor.is_floating_point() or tensor.is_complex())
        return Load(sum(map(_bytes, tensors)), sum(_bytes(tensor) for tensor in tensors if back(tensor)))


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

    def __str__(self) -> str:
        rows = [("rank", *_COLUMNS.values())]
        for row in self.ranks:
            amounts = [getattr(row, name) for name in _COLUMNS]
            rows.append((str(row.rank), *(f"{each.count} ({human(each.bytes)})" for each in amounts)))
        return "\n".join(f"{row[0]:>4}" + "".join(f"{cell:>21}" for cell in row[1:]) for row in rows)


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
    trained = {stage for stage, kind, _, _ in leaves(actions) if kind is FULL_BACKWARD or kind is BACKWARD_WEIGHT}
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
        if kind is FORWARD:
            count, size = count + inputs[stage].count, size + inputs[stage].bytes
            most, largest = max(most, count), max(largest, size)
        if kind is FULL_BACKWARD or kind is BACKWARD_WEIGHT or (kind is FORWARD and stage not in trained):
            count, size = count - inputs[stage].count, size - inputs[stage].bytes
    return Amount(most, largest)


def loads_of(signature: Signature, edges: Sequence[Edge]) -> dict[Edge, Load]:
    """The load of every edge. PipelineUsageError for a signature that leaves one out or is not of tensors."""
    if isinstance(signature, Mapping):
        given = {Edge(*key): _tensors(value) for key, value in signature.items()}
        missing = [edge for edge in edges if edge not in given]
        if missing:
            raise PipelineUsageError(
                f"the signature says nothing of the tensors from stage {missing[0].source} to stage "
                f"{missing[0].destination}: give it for ({missing[0].source}, {missing[0].destination}) too, or one "
                "tensor for all edges"
            )
        return {edge: Load.of(given[edge]) for edge in edges}
    load = Load.of(_tensors(signature))
    return dict.fromkeys(edges, load)


def _tensors(value: Tensors) -> list[torch.Tensor]:
    tensors = [value] if isinstance(value, torch.Tensor) else list(value)
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise PipelineUsageError(
                f"a signature is made of tensors, and {type(tensor).__name__} is none: give, for example, "
                "torch.empty(4, 512, device='meta') for what one microbatch sends from stage to stage"
            )
    return tensors


def _bytes(tensor: torch.Tensor) -> int:
    if is_dtensor(tensor):
        tensor = local_part(tensor)  # what travels
    return tensor.numel() * tensor.element_size()


class Meter:
    """Sees what the stages of this rank take and give in one step, and works out the loads from that."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, bool], list[Load]] = {}

    def around(self, stage: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a stage, measured."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._note((stage, False), args)
            output = forward(*args, **kwargs)
            self._note((stage, True), _normalize_model_output_as_tuple(output))
            return output

        return measured

    def loads(self, wiring: Wiring, stages: Iterable[_PipelineStageBase]) -> dict[Edge, Load]:
        """The loads of the edges that begin or end at these stages, of the largest microbatch."""
        held = {stage.stage_index for stage in stages}
        loads = {}
        for edge in wiring.edges:
            outputs, inputs = wiring.tensors.get(edge, ((), ()))
            if edge.source in held:
                loads[edge] = _sum(self._items(edge.source, True), outputs)
            elif edge.destination in held:
                loads[edge] = _sum(self._items(edge.destination, False), inputs)
        return loads

    def _items(self, stage: int, outputs: bool) -> list[Load]:
        if (stage, outputs) not in self._seen:
            raise PipelineModeError(
                f"the measured step did not run stage {stage}'s module through the runtime: give memory_report the "
                "tensors that one microbatch sends from stage to stage"
            )
        return self._seen[stage, outputs]

    def _note(self, place: tuple[int, bool], items: Sequence[Any]) -> None:
        found = [
            Load.of((leaf for leaf in tree_leaves(item) if isinstance(leaf, torch.Tensor)), _requires_grad)
            for item in items
        ]
        if place not in self._seen or _sum(found).activation > _sum(self._seen[place]).activation:
            self._seen[place] = found


def _sum(loads: Sequence[Load], positions: Sequence[int] = ()) -> Load:
    """Of the items at these positions, or of all."""
    chosen = [loads[position] for position in positions] if positions else loads
    return Load(sum(load.activation for load in chosen), sum(load.gradient for load in chosen))


def _requires_grad(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad
