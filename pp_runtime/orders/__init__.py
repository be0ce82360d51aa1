"""What runs in which sequence: actions (``ir``), orders in files, the catalogue, one file an order."""

from __future__ import annotations

from pp_runtime.orders import ir
from pp_runtime.orders.catalogue import ORDERS, SCHEDULE_NAMES, OrderSpec, build_order, named_order, schedule_name
from pp_runtime.orders.csv_files import FileFormat, dump_order, load_order
from pp_runtime.orders.edges import Edge, Neighbours, adjacent_edges, neighbours
from pp_runtime.orders.ir import (
    Action,
    ActionType,
    Order,
    Placement,
    from_torch_form,
    leaves,
    microbatch_count,
    placement_of,
    to_torch_form,
)
from pp_runtime.orders.limits import require_counts
from pp_runtime.orders.placement import looped, stages_of_rank, v_shaped

__all__ = [
    "Action",
    "ActionType",
    "Edge",
    "FileFormat",
    "Neighbours",
    "ORDERS",
    "Order",
    "OrderSpec",
    "Placement",
    "SCHEDULE_NAMES",
    "adjacent_edges",
    "build_order",
    "dump_order",
    "from_torch_form",
    "ir",
    "leaves",
    "load_order",
    "looped",
    "microbatch_count",
    "named_order",
    "neighbours",
    "placement_of",
    "require_counts",
    "schedule_name",
    "stages_of_rank",
    "to_torch_form",
    "v_shaped",
]
