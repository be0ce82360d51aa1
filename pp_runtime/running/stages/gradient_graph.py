"""Autograd's graph walked against its edges, with torch.distributed.pipelining's call forms.

Our own split backward does this in C++; executors of others (torchrec, nnScaler) import these.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import Node

Users = Mapping[Node, Sequence[Node]]
"""For each node, those that its gradient comes from."""


def _get_grad_fn_or_grad_acc(t: torch.Tensor) -> Node | None:
    """The node that takes the gradient of a tensor; of a leaf, the one that accumulates it."""
    if t.grad_fn is not None or not t.requires_grad:
        return t.grad_fn
    with torch.enable_grad():
        view = t.view_as(t)  # a leaf's accumulator is made when the leaf is first used
    assert view.grad_fn is not None
    return view.grad_fn.next_functions[0][0]


def construct_reverse_graph(roots: Sequence[Node | None]) -> dict[Node, list[Node]]:
    """For every node below the roots, the nodes that its gradient comes from."""
    users: dict[Node, list[Node]] = defaultdict(list)
    reached = dict.fromkeys(node for node in roots if node is not None)
    queue = deque(reached)
    while queue:
        node = queue.popleft()
        for child, _ in node.next_functions:
            if child is None:
                continue
            users[child].append(node)
            if child not in reached:
                reached[child] = None
                queue.append(child)
    return users


def reverse_closure(
    roots: Iterable[Node | None], target_nodes: set[Node], reverse_edges_dict: Users
) -> tuple[set[Node], set[Node]]:
    """The roots and all that their gradients come from, up to the target nodes; and the target nodes met."""
    closure = {node for node in roots if node is not None}
    met: set[Node] = set()
    queue = deque(closure)
    while queue:
        for user in reverse_edges_dict.get(queue.popleft(), ()):
            if user in target_nodes:
                met.add(user)
            elif user not in closure:
                closure.add(user)
                queue.append(user)
    return closure, met


def get_param_groups(
    inputs: Sequence[Node | None], params: Sequence[Node], reverse_edges_dict: Users
) -> list[dict[str, Any]]:
    """The parameters' nodes in groups that meet the inputs' side of the graph in common nodes.

    Each group is a dict: ``params``, and ``intermediates``, the nodes of the inputs' side where their own side ends.
    Parameters that do not meet it are in no group.
    """
    of_inputs, _ = reverse_closure(inputs, set(), reverse_edges_dict)
    groups: list[dict[str, Any]] = []
    for param in params:
        _, met = reverse_closure([param], of_inputs, reverse_edges_dict)
        if not met:
            continue
        group = {"params": {param}, "intermediates": met}
        for other in [other for other in groups if other["intermediates"] & met]:
            groups.remove(other)
            group = {key: other[key] | group[key] for key in group}
        groups.append(group)
    return groups
