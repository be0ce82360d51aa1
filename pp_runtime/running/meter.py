"""How many bytes a microbatch takes on each edge: as a signature says, or as a step had it on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from pp_runtime.errors import PipelineModeError, PipelineUsageError
from pp_runtime.orders import Edge
from pp_runtime.planning import Load, Wiring
from pp_runtime.running.values import _normalize_model_output_as_tuple, is_dtensor, local_part

Tensors = torch.Tensor | Sequence[torch.Tensor]
Signature = Tensors | Mapping[tuple[int, int], Tensors]
"""What one microbatch sends over each edge; one value for all, or one for each ``(source stage, destination stage)``.

Only shapes and dtypes are read, so tensors on the meta device do.
"""


def load_of(tensors: Iterable[torch.Tensor], backward: Callable[[torch.Tensor], bool] | None = None) -> Load:
    """Of these tensors; gradients come back for the floating ones, or for those that ``backward`` says."""
    tensors = list(tensors)
    back = backward or (lambda tensor: tensor.is_floating_point() or tensor.is_complex())
    return Load(sum(map(_bytes, tensors)), sum(_bytes(tensor) for tensor in tensors if back(tensor)))


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
        return {edge: load_of(given[edge]) for edge in edges}
    load = load_of(_tensors(signature))
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

    def loads(self, wiring: Wiring, held: Set[int]) -> dict[Edge, Load]:
        """The loads of the edges that begin or end at the held stages, of the largest microbatch."""
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
            load_of((leaf for leaf in tree_leaves(item) if isinstance(leaf, torch.Tensor)), _requires_grad)
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
