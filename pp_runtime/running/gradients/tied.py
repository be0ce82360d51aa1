"""Parameters that several stages share: their gradients are added up over the stages at the end of each step.

    stage 0, rank 0   embedding.weight ─┐
                                        ├─ "embedding": both get the sum of both gradients
    stage 3, rank 1   head.weight ──────┘

Stages on one rank may share the parameter itself, and then autograd adds. On different ranks each has a copy; copies
that begin equal and get equal gradients stay equal, as in Megatron-LM and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from pp_runtime.errors import PipelineUsageError
from pp_runtime.running.held_stage import HeldStage
from pp_runtime.running.values import dtensor_like, is_dtensor, local_part

# What wrappers put into the names of the parameters that they wrap; a module of a model may be called "module", too.
_OF_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class TieClaim:
    """What a rank says of one tied parameter. Shape and values are of its own part, where it is a DTensor."""

    label: str
    stage: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    values: tuple[float, float] | None

    @staticmethod
    def of(stage: HeldStage, label: str, name: str) -> TieClaim:
        parameter = find_parameter(stage, name)
        local = local_part(parameter) if is_dtensor(parameter) else parameter.detach()
        values = None
        if not local.is_meta:
            wide = local.double()
            values = (float(wide.sum()), float(wide.abs().sum()))
        layout = str(parameter.placements) if is_dtensor(parameter) else ""
        return TieClaim(label, stage.stage_index, name, tuple(local.shape), str(local.dtype), layout, values)


def ties_of(stage: HeldStage) -> dict[str, list[str]]:
    """The labels of a stage's tied parameters, and the names under each: those declared, and those of a trace."""
    labels = {label: list(names) for label, names in stage._ties.items()}
    for entry in stage.tied_parameters():
        label = "traced " + " ".join(f"{index}.{name}" for index, name in entry)
        names = [name for index, name in entry if index == stage.stage_index]
        if names:
            labels[label] = names
    return labels


def find_parameter(stage: HeldStage, name: str) -> nn.Parameter:
    """The parameter of a stage's module with this name, whatever wraps the module by now."""
    wanted = _bare(name)
    for found, parameter in stage.submod.named_parameters(remove_duplicate=False):
        if _bare(found) == wanted:
            return parameter
    raise PipelineUsageError(
        f"stage {stage.stage_index} ties '{name}', which is no parameter of its module: use a name of "
        "stage.submod.named_parameters()"
    )


# Copies of a tied parameter that a norm over all stages leaves out: another stage has it first.
_later_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def counted_elsewhere(parameter: torch.Tensor) -> bool:
    """Whether this is a copy of a tied parameter, of which the first stage that has it holds another."""
    return parameter in _later_copies


class TiedGradients:
    """Adds up the gradients of this rank's tied parameters, at the end of each step."""

    def __init__(self, stages: Sequence[HeldStage], claims: Sequence[Iterable[TieClaim]], rank: int) -> None:
        holders: dict[str, dict[int, list[TieClaim]]] = {}
        for holder, of_rank in enumerate(claims):
            for claim in of_rank:
                holders.setdefault(claim.label, {}).setdefault(holder, []).append(claim)
        for label, by_rank in holders.items():
            _check(label, by_rank)
        self._by_index = {stage.stage_index: stage for stage in stages}
        self._ranks_of = {label: tuple(sorted(by_rank)) for label, by_rank in sorted(holders.items())}
        self._own = {label: by_rank[rank] for label, by_rank in sorted(holders.items()) if rank in by_rank}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._owners = {
            label: min(claim.stage for of_rank in by_rank.values() for claim in of_rank)
            for label, by_rank in holders.items()
        }
        for stage in stages:
            stage._tie_owners.update(self._owners)

    def __bool__(self) -> bool:
        return bool(self._own)

    def connect(self, group: dist.ProcessGroup) -> None:
        """Make the groups of the ranks that hold a parameter together."""
        members = dist.get_process_group_ranks(group)
        for label in self._own:
            ranks = self._ranks_of[label]
            if len(ranks) > 1 and ranks not in self._groups:
                self._groups[ranks] = (
                    group
                    if len(ranks) == len(members)
                    else dist.new_group([members[rank] for rank in ranks], use_local_synchronization=True)
                )

    def reduce(self) -> None:
        """Give every holder the sum of all holders' gradients; None where nobody has one."""
        for label, claims in self._own.items():
            found = [find_parameter(self._by_index[claim.stage], claim.name) for claim in claims]
            self._mark(label, claims, found)
            self._reduce(list({id(each): each for each in found}.values()), self._groups.get(self._ranks_of[label]))

    def _mark(self, label: str, claims: Sequence[TieClaim], found: Sequence[nn.Parameter]) -> None:
        # Each step anew: a program may have wrapped its module, and so replaced the parameter.
        owner = self._owners[label]
        first = next((p for claim, p in zip(claims, found, strict=True) if claim.stage == owner), None)
        for parameter in found:
            if parameter is not first:
                _later_copies[parameter] = True

    @torch.no_grad()
    def _reduce(self, parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if group is None and len(parameters) == 1:
            return
        first = gradients[0] if gradients else torch.zeros_like(parameters[0])
        whole = local_part(first) if is_dtensor(first) else first
        whole = whole.to_dense() if whole.is_sparse else whole.contiguous()
        for other in gradients[1:]:
            whole = whole + (local_part(other) if is_dtensor(other) else other)
        anybody = torch.tensor([float(bool(gradients))], device=whole.device)
        if group is not None:
            # Both at once: neither waits for the other.
            works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in (anybody, whole)]
            for work in works:
                work.wait()
        if not anybody.item():
            return
        for place, parameter in enumerate(parameters):
            if parameter.requires_grad:
                own = whole if place == 0 else whole.clone()
                parameter.grad = dtensor_like(own, first) if is_dtensor(first) else own


def _check(label: str, by_rank: Mapping[int, Sequence[TieClaim]]) -> None:
    """Raise, alike on every rank, where these cannot be one parameter."""
    claims = [(rank, claim) for rank, of_rank in sorted(by_rank.items()) for claim in of_rank]
    rank, first = claims[0]
    if len(claims) == 1:
        raise PipelineUsageError(
            f"only stage {first.stage} on rank {rank} ties '{label}': tie the other stages' parameter by the same label"
        )
    for other_rank, claim in claims[1:]:
        where = f"stage {claim.stage} on rank {other_rank} and of stage {first.stage} on rank {rank}"
        for what in ("shape", "dtype", "layout"):
            one, another = getattr(claim, what), getattr(first, what)
            if one != another:
                raise PipelineUsageError(
                    f"the {what} of '{label}' is not the same, that of {where}: {one} and {another}: a tied parameter "
                    "is one parameter, sharded alike on both"
                )
        if claim.values is not None and first.values is not None and not _close(claim.values, first.values):
            raise PipelineUsageError(
                f"the values of '{label}' are not the same, those of {where}: a tied parameter is one parameter, so "
                "give both copies the same values before the first step"
            )


def _close(values: Sequence[float], others: Sequence[float]) -> bool:
    size = max(abs(values[1]), abs(others[1]), 1e-30)
    return all(abs(a - b) <= _TOLERANCE * size for a, b in zip(values, others, strict=True))


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS and part != "module")


def unwrapped_name(module: nn.Module, name: str) -> str:
    """The name of a parameter or buffer in what is inside of the wrappers of a module."""
    kept = []
    inside: Any = module
    for part in name.split("."):
        if part not in _OF_WRAPPERS and not (part == "module" and isinstance(inside, DistributedDataParallel)):
            kept.append(part)
        inside = getattr(inside, part, None)
    return ".".join(kept)


def claims_of(stages: Iterable[HeldStage]) -> list[TieClaim]:
    """What this rank says of its tied parameters."""
    return [
        TieClaim.of(stage, label, name)
        for stage in stages
        for label, names in sorted(ties_of(stage).items())
        for name in names
    ]


def read_claims(words: Iterable[Mapping[str, Any]]) -> list[TieClaim]:
    """The claims as another rank's word has them."""
    return [
        TieClaim(**{**word, "shape": tuple(word["shape"]), "values": word["values"] and tuple(word["values"])})
        for word in words
    ]
