"""Every named order: how it is built, where its stages stand, what it allows and who described it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pp_runtime.orders.dual_pipe_v import dual_pipe_v
from pp_runtime.orders.forward_only import forward_only
from pp_runtime.orders.gpipe import gpipe
from pp_runtime.orders.interleaved_1f1b import interleaved_1f1b
from pp_runtime.orders.interleaved_zero_bubble import interleaved_zero_bubble
from pp_runtime.orders.ir import Order, Placement
from pp_runtime.orders.looped_bfs import looped_bfs
from pp_runtime.orders.one_f_one_b import one_f_one_b
from pp_runtime.orders.placement import looped, v_shaped
from pp_runtime.orders.v_half import v_half
from pp_runtime.orders.v_min import v_min
from pp_runtime.orders.zb1p import zb1p
from pp_runtime.orders.zb2p import zb2p
from pp_runtime.orders.zbv import zbv


@dataclass(frozen=True, slots=True)
class OrderSpec:
    """A named order.

    ``build(ranks, stages, microbatches)`` and ``placement(ranks, stages)`` raise ValueError for counts that the order
    does not allow.
    """

    name: str
    build: Callable[[int, int, int], Order]
    placement: Callable[[int, int], Placement]
    stages_per_rank_allowed: tuple[int, ...] | None  # None: any number from 1
    splits_backward: bool  # has I and W
    paper: str
    forward_only: bool = False


_SPECS = (
    OrderSpec("GPipe", gpipe, looped, (1,), False, "arXiv:1811.06965"),
    OrderSpec("1F1B", one_f_one_b, looped, (1,), False, "arXiv:1806.03377"),
    OrderSpec("ForwardOnly", forward_only, looped, None, False, "", forward_only=True),
    OrderSpec("LoopedBFS", looped_bfs, looped, None, False, "arXiv:2211.05953"),
    OrderSpec("Interleaved1F1B", interleaved_1f1b, looped, None, False, "arXiv:2104.04473"),
    OrderSpec("InterleavedZeroBubble", interleaved_zero_bubble, looped, None, True, "arXiv:2401.10241"),
    OrderSpec("ZBVZeroBubble", zbv, v_shaped, (2,), True, "arXiv:2401.10241"),
    OrderSpec("DualPipeV", dual_pipe_v, v_shaped, (2,), True, "arXiv:2412.19437"),
    OrderSpec("ZB1P", zb1p, looped, (1,), True, "arXiv:2401.10241"),
    OrderSpec("ZB2P", zb2p, looped, (1,), True, "arXiv:2401.10241"),
    OrderSpec("VHalf", v_half, v_shaped, (2,), True, "arXiv:2405.15362"),
    OrderSpec("VMin", v_min, v_shaped, (2,), True, "arXiv:2405.15362"),
)

ORDERS: dict[str, OrderSpec] = {spec.name: spec for spec in _SPECS}
SCHEDULE_NAMES = (*ORDERS, "Auto")  # which is searched for, and so no order of the catalogue
_BY_LOWERCASE = {name.lower(): name for name in SCHEDULE_NAMES}


def schedule_name(text: str) -> str | None:
    """The name of an order as the catalogue has it, or "Auto", whatever its case; None if there is none."""
    return _BY_LOWERCASE.get(text.lower())


def build_order(name: str, num_ranks: int, num_stages: int, num_microbatches: int) -> tuple[Order, Placement]:
    """The compute actions of a named order, and where its stages stand.

    Raises ValueError for an unknown name, and for counts that the order does not allow.
    """
    spec = ORDERS.get(name)
    if spec is None:
        raise ValueError(f"'{name}' is not an order; the orders are {', '.join(ORDERS)}.")
    order = spec.build(num_ranks, num_stages, num_microbatches)
    return order, spec.placement(num_ranks, num_stages)


def named_order(name: str, num_ranks: int, num_stages: int, num_microbatches: int) -> Order:
    """The compute actions alone of a named order."""
    return build_order(name, num_ranks, num_stages, num_microbatches)[0]
