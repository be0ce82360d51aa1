"""What a step will do on every rank: messages placed, order proved, slots counted; then one rank's program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pp_runtime import _C
from pp_runtime.orders import Action, Edge, Order, Placement, adjacent_edges, ir
from pp_runtime.planning.lowering import Channel, Handlers, Lowered, Lowering
from pp_runtime.planning.passes import (
    ChannelKey,
    Limits,
    channel_limits,
    defer_receives,
    insert_communication,
    insert_reduce_grad,
    insert_unshard,
)
from pp_runtime.planning.topology import StageWiring

_FORWARD_ONLY = (ir.FORWARD, ir.SEND_F, ir.RECV_F, ir.UNSHARD, ir.RESHARD)
# Beyond what is alive at once: one message under way, and one that the receiver may hold when it takes the next.
_SPARE_CREDITS = 2


@dataclass(frozen=True)
class Wiring:
    """The edges between stages, with which outputs are which inputs; empty lists are all, in order."""

    edges: tuple[Edge, ...]
    tensors: Mapping[Edge, tuple[Sequence[int], Sequence[int]]]

    @staticmethod
    def of(num_stages: int, traced: StageWiring | None = None) -> Wiring:
        """The wiring of the whole pipeline, which each traced stage knows; a chain's without one."""
        if traced is None:
            return Wiring(adjacent_edges(num_stages), {})
        tensors = {Edge(e.source, e.destination): (e.outputs, e.inputs) for e in traced.edges}
        return Wiring(tuple(sorted(tensors)), tensors)

    def core_edges(self) -> list[_C.Edge]:
        """As the executor reads them."""
        nothing: tuple[Sequence[int], Sequence[int]] = ((), ())
        return [
            _C.Edge(edge.source, edge.destination, *map(list, self.tensors.get(edge, nothing))) for edge in self.edges
        ]


class Plan:
    """The order of all ranks with its messages. Pure: needs no process group and no other rank."""

    def __init__(
        self,
        order: Order,
        placement: Placement,
        num_microbatches: int,
        wiring: Wiring,
        *,
        has_backward: bool = True,
        with_comms: bool = False,
        rebuild_order: Callable[[], Order] | None = None,
    ) -> None:
        self._held: Order | None = order
        self._build = rebuild_order
        self.placement = placement
        self.num_microbatches = num_microbatches
        self.wiring = wiring
        self._has_backward = has_backward
        self._with_comms = with_comms

    @property
    def order(self) -> Order:
        """The compute actions of all ranks."""
        if self._held is None and self._build is not None:
            self._held = self._build()
        return self._held or {}

    def release(self) -> None:
        """Drop the orders of all ranks, where they can be built again: to run, a rank needs its own program only."""
        if self._build is not None:
            self._held = None
            self.__dict__.pop("with_communication", None)
            self.__dict__.pop("forward_only", None)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Which stage gives to which."""
        return self.wiring.edges

    @cached_property
    def with_communication(self) -> Order:
        """The order with sends, receives, unshards, reshards and reductions."""
        if self._with_comms:
            # The executor waits where a receive stands, so a loaded order's receives go to where they are needed. A
            # sharded stage without a reduction would keep each rank's own gradients.
            return defer_receives(insert_reduce_grad(self.order))
        order = insert_reduce_grad(insert_unshard(self.order)) if self._has_backward else self.order
        return insert_communication(order, self.placement, self.wiring.edges, backward=self._has_backward)

    @cached_property
    def forward_only(self) -> Order:
        """The same order without its backwards: what an evaluation runs."""
        order = {rank: _forwards(actions) for rank, actions in self.order.items()}
        return (
            order
            if self._with_comms
            else insert_communication(order, self.placement, self.wiring.edges, backward=False)
        )

    def credits(self) -> dict[Channel, int]:
        """For each channel, how many messages its receiver needs room for."""
        return {self._channel(key): limits.room + _SPARE_CREDITS for key, limits in self._limits.items()}

    def ahead(self) -> dict[Channel, int]:
        """For each channel, how many messages its sender may be ahead of what the receiver has taken."""
        return {self._channel(key): limits.ahead + _SPARE_CREDITS for key, limits in self._limits.items()}

    @cached_property
    def _limits(self) -> dict[ChannelKey, Limits]:
        return channel_limits(self.with_communication, self.placement, self.wiring.edges)

    def _channel(self, key: ChannelKey) -> Channel:
        edge, backward = key
        return Channel(edge.source, edge.destination, backward, *self._ends(edge, backward))

    def _ends(self, edge: Edge, backward: bool) -> tuple[int, int]:
        source, destination = self.placement[edge.source], self.placement[edge.destination]
        return (destination, source) if backward else (source, destination)

    def lower(self, rank: int, *, training: bool, handlers: Handlers) -> Lowered:
        """One rank's program."""
        order = self.with_communication if training else self.forward_only
        slots = {stage: slot for slot, stage in enumerate(s for s, r in enumerate(self.placement) if r == rank)}
        edges = [(edge.source, edge.destination) for edge in self.wiring.edges]
        return Lowering(rank, self.placement, edges, slots, handlers).lower(order[rank])


def _forwards(actions: Sequence[Action]) -> list[Action]:
    kept: list[Action] = []
    for action in actions:
        if action.computation_type in _FORWARD_ONLY:
            kept.append(action)
        elif action.computation_type is ir.OVERLAP_F_B:
            kept += [part for part in action.sub_actions or () if part.computation_type is ir.FORWARD]
    return kept
