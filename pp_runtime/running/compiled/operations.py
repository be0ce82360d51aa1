"""What the cut of a backward graph asks of each of its nodes: what it costs to run, to run twice and to keep."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

HINT = 4096
"""Of a dimension whose size torch does not know."""

# The matrix products and convolutions, by the operator's name without overload: what W exists for.
PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::addbmm",
        "aten::matmul",
        "aten::linear",
        "aten::linear_backward",
        "aten::convolution",
        "aten::convolution_backward",
        "aten::mkldnn_rnn_layer_backward",
        "aten::_int_mm",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "aten::_scaled_grouped_mm",
    }
)

# Beside what torch tags as pointwise, and views: one pass over the data, the same each time.
CHEAP = frozenset(
    f"aten::{name}"
    for name in (
        "sum mean amax amin var var_mean var_mean.correction prod any all argmax argmin "
        "full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full new_empty empty_like arange eye "
        "scalar_tensor constant_pad_nd cat stack clone _to_copy copy where masked_fill _unsafe_view reshape "
        "slice_backward select_backward slice_scatter select_scatter expand_copy gather index embedding flip roll "
        "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data native_layer_norm "
        "gelu_backward silu_backward threshold_backward tanh_backward sigmoid_backward tril triu"
    ).split()
) | {"prims::convert_element_type", "prims::iota", "prims::broadcast_in_dim", "prims::fma"}

# An alias of its input though its schema does not say so.
_UNSAID_VIEWS = {"aten::_unsafe_view", "aten::reshape"}

# Their schemas say that they write, so that nobody takes them out; they give what they are given.
_WAITS = {"_c10d_functional::wait_tensor"}


def name_of(node: fx.Node) -> str:
    """As ``aten::mm``; empty for what is no operator of torch's."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    return ""


def is_product(node: fx.Node) -> bool:
    return name_of(node) in PRODUCTS


def is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returns = target._schema.returns
    aliases = any(part.alias_info is not None and not part.alias_info.is_write for part in returns)
    return aliases or name_of(node) in _UNSAID_VIEWS


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_number(node: fx.Node) -> bool:
    """Whether its value is a size or another number, not a tensor."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def may_run_twice(node: fx.Node) -> bool:
    """Whether W may compute anew what I computed too: the same each time, and about as quick as reading it."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and may_run_twice(node.args[0])
    if is_number(node):
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or draws_random_numbers(node):
        return False
    return is_view(node) or torch.Tag.pointwise in target.tags or name_of(node) in CHEAP


def draws_random_numbers(node: fx.Node) -> bool:
    """Attention says that it may, and does not where nothing is dropped."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else argument.default_value
            return bool(node.kwargs.get("dropout_p", given) != 0.0)
    return True


def objection_to(node: fx.Node) -> str | None:
    """Why a graph with this node is not cut, or None."""
    if node.op == "call_module" or node.op == "call_method":
        return f"it calls {node.target}"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable and name_of(node) not in _WAITS:
            return f"{target} writes into its arguments"
        if draws_random_numbers(node):
            return f"{target} draws random numbers"
    elif isinstance(target, torch._ops.HigherOrderOperator):
        name = target.name()
        if "effect" in name or "functionalized" in name or "triton" in name:
            return f"{name} has side effects"
    return None


def bytes_of(node: fx.Node) -> float:
    """How much memory keeping the node's value takes; infinite where it is no tensor or number that can be kept."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return math.prod(map(_hint, value.shape)) * value.element_size()
    if isinstance(value, (int, torch.SymInt)):
        return 8.0
    return math.inf


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return HINT if hint is None else int(hint)
