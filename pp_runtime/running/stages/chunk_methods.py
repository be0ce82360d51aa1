"""A stage's forward and backward in torch's form: the methods that custom functions call and subclasses override.

The runtime runs a stage in C++ and calls none of this. It does where a program replaced one of these methods, on a
subclass or on the stage itself: then every F, B, I and W of the stage is the method, as in torch, over the caches that
torch's methods share (``fwd_cache``, ``bwd_cache``), and what the program puts there is what is sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from pp_runtime import _C
from pp_runtime.errors import PipelineUsageError
from pp_runtime.running.held_stage import HeldStage
from pp_runtime.running.stages.backward_functions import stage_backward, stage_backward_input, stage_backward_weight
from pp_runtime.running.values import _normalize_model_output_as_tuple, tensors_and_structure

# Replaced, each of these changes what the stage does, as in torch.
HONOURED = (
    "forward_one_chunk",
    "backward_one_chunk",
    "backward_weight_one_chunk",
    "forward_maybe_with_nosync",
    "backward_maybe_with_nosync",
    "_retrieve_recv_activations",
    "_retrieve_recv_grads",
    "scale_grads",
    "perform_reduce_grad",
)
# Those that an F, B, I or W calls.
_IN_ACTIONS = frozenset(HONOURED[:7])
# torch's runtime calls these, ours does something else in their place: replaced, they would be passed over.
REFUSED = (
    "get_fwd_recv_ops",
    "get_bwd_recv_ops",
    "get_fwd_send_ops",
    "get_bwd_send_ops",
    "set_local_fwd_input",
    "get_local_bwd_output",
    "set_local_bwd_input",
    "_get_recv_ops",
    "_get_init_p2p_neighbors_ops",
    "_create_grad_send_info",
    "_create_grad_recv_info",
    "_create_act_send_info",
    "_create_act_recv_info",
    "_setup_forward_recv_info",
    "_setup_backward_recv_info",
    "_map_tensor_from_recv_info",
    "_validate_stage_tensors",
    "_resolve_peer_global_rank",
    "clear_runtime_states",
)


# Abstract in torch, so that a subclass that never runs must have it; looked at when a step begins.
_ABSTRACT = frozenset(("_create_grad_recv_info",))
# Make room for messages, which the runtime does by its plan; replaced, they change no number. Programs put a pool of
# their own there.
_MAKE_ROOM = frozenset(("_prepare_forward_infra", "_prepare_backward_infra"))


class _ForwardCache(dict[int, tuple[Any, list[Any]]]):
    """By microbatch, a stage's output tuple and its input tensors; what is put here is what the stage sends."""

    def __init__(self, core: _C.Stage, *, sends: bool) -> None:
        super().__init__()
        self._core = core
        self._sends = sends

    def __setitem__(self, microbatch: int, value: tuple[Any, list[Any]]) -> None:
        super().__setitem__(microbatch, value)
        if self._sends:
            self._core.give_outputs(microbatch, tuple(value[0]))

    def __delitem__(self, microbatch: int) -> None:
        super().__delitem__(microbatch)
        self._core.drop_graph(microbatch)

    def pop(self, microbatch: int, *default: Any) -> Any:
        if microbatch in self:
            self._core.drop_graph(microbatch)
        return super().pop(microbatch, *default)


class _BackwardCache(dict[int, tuple[torch.Tensor | None, ...]]):
    """By microbatch, the gradients of a stage's inputs; what is put here is what the stage sends back."""

    def __init__(self, core: _C.Stage) -> None:
        super().__init__()
        self._core = core

    def __setitem__(self, microbatch: int, value: tuple[torch.Tensor | None, ...]) -> None:
        # Nothing is kept here: the runtime has it, until it is sent.
        self._core.give_input_gradients(microbatch, list(value))

    def pop(self, microbatch: int, *default: Any) -> Any:
        return tuple(self._core.input_gradients(microbatch))


class ChunkMethods(HeldStage):
    """One microbatch of a stage at a time, as torch's stage does it."""

    def _make_caches(self) -> None:
        self.fwd_cache = _ForwardCache(self._core, sends=not self.is_last)
        self.bwd_cache = _BackwardCache(self._core)
        self.backward_state: dict[int, tuple[Any, ...]] = {}
        self.dw_runner: dict[int, Callable[..., None]] = {}
        self._inputs_of: dict[int, int] = {}

    def _clear_caches(self) -> None:
        for kept in (self.fwd_cache, self.backward_state, self.dw_runner, self._inputs_of):
            kept.clear()

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Run one microbatch forward, on ``args`` in the first stage, elsewhere on what was received."""
        if self.runs_by_hand():
            inputs = args if self.is_first else self._retrieve_recv_activations(fwd_chunk_id)
            output = self.forward_maybe_with_nosync(*inputs, **(kwargs or {}))
            self._inputs_of[fwd_chunk_id] = len(inputs)
            self.fwd_cache[fwd_chunk_id] = (
                _normalize_model_output_as_tuple(output),
                [*tree_leaves(tuple(inputs)), *tree_leaves(kwargs or {})],
            )
        else:
            output = self._core.forward(fwd_chunk_id, tuple(args or ()), kwargs or {})
        if self.is_last and save_forward_output:
            self.output_chunks.append(output)
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: torch.Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Run one microbatch backward: all of it, or the input half only."""
        if not self.has_backward:
            return
        if not self.runs_by_hand():
            if self.is_last and loss is not None:
                self._core.set_loss(bwd_chunk_id, loss)
            kind = _C.BackwardKind.FULL if full_backward else _C.BackwardKind.INPUT
            self._core.backward(bwd_chunk_id, kind, last_backward)
            return
        outputs, inputs = self.fwd_cache.pop(bwd_chunk_id)
        gradients = None if self.is_last else self._retrieve_recv_grads(bwd_chunk_id)
        what = {"stage_output": loss if self.is_last else outputs, "output_grads": gradients, "input_values": inputs}
        if full_backward or self.dw_builder is not None:
            found, _ = self.backward_maybe_with_nosync("full", what, last_backward=last_backward)
            if self.dw_builder is not None:
                runner = self.dw_builder()
                if full_backward:
                    runner()
                else:
                    self.dw_runner[bwd_chunk_id] = runner
        elif self.is_first:
            # Its inputs may be nobody's, and then W is the whole backward.
            found = ()
            self.backward_state[bwd_chunk_id] = (what, None)
        else:
            if isinstance(what["stage_output"], torch.Tensor):
                what["stage_output"] = (what["stage_output"],)
            found, groups = self.backward_maybe_with_nosync("input", what, last_backward=last_backward)
            self.backward_state[bwd_chunk_id] = (what, groups)
        if not self.is_first:
            self.bwd_cache[bwd_chunk_id] = tuple(found[: self._inputs_of[bwd_chunk_id]])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run the weight half of a microbatch's backward."""
        if not self.has_backward:
            return
        if not self.runs_by_hand():
            self._core.backward(bwd_chunk_id, _C.BackwardKind.WEIGHT, last_backward)
        elif self.dw_builder is not None:
            self.dw_runner.pop(bwd_chunk_id)()
        else:
            what, groups = self.backward_state.pop(bwd_chunk_id)
            if groups is None:
                self.backward_maybe_with_nosync("full", what, last_backward=last_backward)
            else:
                half = {"stage_output": what["stage_output"], "param_groups": groups}
                self.backward_maybe_with_nosync("weight", half, last_backward=last_backward)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module so that its data-parallel wrappers do not reduce in the backward that follows."""
        adapter = self.adapter()
        with (adapter.forward_context() if adapter is not None else None) or nullcontext():
            return self.submod(*args, **kwargs)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[torch.Tensor | None, ...], list[dict[str, Any]] | None]:
        """Run a ``full``, ``input`` or ``weight`` backward; data-parallel wrappers reduce in the last one only."""
        adapter = self.adapter()
        if adapter is not None:
            outputs = [each for each in tree_leaves(bwd_kwargs["stage_output"]) if isinstance(each, torch.Tensor)]
            adapter.before_backward(last_backward, outputs)
        try:
            return self._backward(backward_type, bwd_kwargs)
        finally:
            if adapter is not None:
                adapter.after_backward(last_backward)

    def _backward(
        self, backward_type: str, what: dict[str, Any]
    ) -> tuple[tuple[torch.Tensor | None, ...], list[dict[str, Any]] | None]:
        parameters = self.submod.parameters()
        if backward_type == "full":
            return stage_backward(what["stage_output"], what["output_grads"], what["input_values"]), None
        if backward_type == "input":
            return stage_backward_input(what["stage_output"], what["output_grads"], what["input_values"], parameters)
        if backward_type == "weight":
            return stage_backward_weight(parameters, what["param_groups"]), None
        raise PipelineUsageError(f"backward_type is 'full', 'input' or 'weight', got {backward_type!r}")

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Any, ...]:
        """The positional inputs that came for a microbatch, as leaves of a graph of their own."""
        return self._core.take_inputs(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[torch.Tensor | None, ...]:
        """The gradients that came for a microbatch's outputs; None where there is none."""
        return tuple(self._core.take_output_gradients(bwd_chunk_id))

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Give this stage the output of the stage before it, which is on the same rank."""
        tensors, structure = tensors_and_structure(prev_stage_outputs, self.stage_index - 1)
        self._core.accept_activation(mb_index, tensors, structure)

    def get_local_bwd_output(self, mb_index: int) -> tuple[torch.Tensor | None, ...]:
        """The gradients of this stage's inputs, for the stage before it; a second call finds none."""
        return tuple(self._core.input_gradients(mb_index))

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int) -> None:
        """Give this stage the gradients of its outputs, from the stage after it on the same rank."""
        self._core.set_output_gradients(mb_index, list(next_stage_bwd_outputs))

    # Replaced methods

    def replaced(self, *, in_step: bool = True) -> frozenset[str]:
        """Which of the methods above a program replaced, on a subclass or on this stage. It is asked at every step.

        Raises PipelineUsageError for one that torch's runtime calls and this one does not.
        """
        own, names = self.__dict__, _NAMES
        found = {name for name in names if name in own}
        theirs, ours = names.of(type(self)), names.of_base
        if theirs != ours:
            found.update(name for name, a, b in zip(names, theirs, ours, strict=True) if a is not b)
        if room := found.intersection(_MAKE_ROOM):
            warnings.warn(
                f"{', '.join(sorted(room))} of a stage was replaced and is not called: pp_runtime plans the storage of "
                "its messages, in as many slots as are in use at once",
                stacklevel=2,
            )
            found -= room
        for name in found.intersection(REFUSED):
            if name in _ABSTRACT and not in_step:
                continue
            where = "this stage" if name in own else type(self).__qualname__
            index = getattr(self, "stage_index", "?")
            raise PipelineUsageError(
                f"{where} replaces {name} of stage {index}, which torch's runtime calls and pp_runtime's does "
                f"not, so that it would be passed over: replace one of {', '.join(HONOURED[:5])}, or register a "
                "custom function with the schedule"
            )
        return frozenset(found)

    def replaces(self, name: str) -> bool:
        """Whether a program replaced this one of the methods."""
        return name in self.__dict__ or getattr(type(self), name, None) is not _NAMES.of_base[_NAMES.index(name)]

    def runs_by_hand(self) -> bool:
        """Whether the runtime calls these methods for this stage."""
        return not self.replaced().isdisjoint(_IN_ACTIONS)


_Stage = TypeVar("_Stage")


class _Names(tuple[str, ...]):
    """The names that are looked at, and the functions that they stand for."""

    of_base: tuple[Any, ...]

    def of(self, cls: type) -> tuple[Any, ...]:
        return tuple([getattr(cls, name, None) for name in self])


_NAMES = _Names((*HONOURED, *REFUSED, *_MAKE_ROOM))


def base_of_stages(cls: type[_Stage]) -> type[_Stage]:
    """The class whose methods are not replaced ones: the base of all stages."""
    _NAMES.of_base = _NAMES.of(cls)
    return cls
