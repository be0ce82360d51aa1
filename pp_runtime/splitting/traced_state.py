"""A traced model's parameters, buffers and constants on their way into its stages.

    model: embedding.weight is head.weight
    stage 0: embedding.weight ── the model's own        stage 3: head.weight ── a copy      tied: ((0, ...), (3, ...))

Each stage has what its graph reads, under the model's name for it there. A parameter that several stages read is the
model's own in the first of them and a copy in each other one; whoever trains them adds up their gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pp_runtime.splitting.in_place import attribute

TiedParameters = tuple[tuple[tuple[int, str], ...], ...]
"""Of each parameter that several stages have: (stage, name in that stage) for every one of them."""


class TracedState:
    """Gives the stages of one traced model what their graphs read."""

    def __init__(self, traced: fx.GraphModule, model: torch.nn.Module, temporary: frozenset[str]) -> None:
        self._traced = traced
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._names: dict[int, list[str]] = {}
        for name, tensor in named:
            self._names.setdefault(id(tensor), []).append(name)
        self._owners: dict[int, int] = {}  # the first stage that has a parameter
        self._copies: dict[tuple[int, int], torch.nn.Parameter] = {}
        self.temporary: set[str] = set(temporary)  # and what is no state of the model

    def fetch(self, graph: fx.Graph, module: torch.nn.Module, stage: int, node: fx.Node, user: fx.Node) -> fx.Node:
        """A node of a stage's graph that reads what ``node`` reads in the whole one; the module gets it."""
        value = attribute(self._traced, str(node.target))
        name = str(node.target)
        if isinstance(value, torch.Tensor):
            name = self._name(value, name, user)
            if name not in self._buffers and not isinstance(value, torch.nn.Parameter):
                self.temporary.add(name)
            if isinstance(value, torch.nn.Parameter):
                value = self._own(value, stage)
        _put(module, name, value)
        fetched = graph.get_attr(name)
        fetched.meta = copy.copy(node.meta)
        return fetched

    def put_module(self, module: torch.nn.Module, name: str) -> None:
        """Give a stage a module that its graph calls."""
        _put(module, name, attribute(self._traced, name))

    def _name(self, value: torch.Tensor, name: str, user: fx.Node) -> str:
        """Of a tensor's names, the one that the module has where it is used: ``head.weight`` in the head."""
        names = self._names.get(id(value), [])
        if len(names) > 1:
            for path, _ in reversed(list((user.meta.get("nn_module_stack") or {}).values())):
                for known in names:
                    if known.rpartition(".")[0] == path.partition("@")[0]:
                        return known
        return name

    def _own(self, value: torch.nn.Parameter, stage: int) -> torch.nn.Parameter:
        """The parameter itself in the first stage that uses it, a copy in each of the others."""
        if self._owners.setdefault(id(value), stage) == stage:
            return value
        if (id(value), stage) not in self._copies:
            self._copies[id(value), stage] = copy.deepcopy(value)
        return self._copies[id(value), stage]

    def tied(self, modules: Sequence[torch.nn.Module]) -> TiedParameters:
        """The parameters that several stages use, each with its name in every one of them."""
        originals = {id(copied): original for (original, _), copied in self._copies.items()}
        uses: dict[int, list[tuple[int, str]]] = {}
        for stage, module in enumerate(modules):
            for name, parameter in module.named_parameters():
                uses.setdefault(originals.get(id(parameter), id(parameter)), []).append((stage, name))
        return tuple(sorted(tuple(places) for places in uses.values() if len(places) > 1))


def _put(module: torch.nn.Module, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, torch.nn.Module())
        module = getattr(module, parent)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
