"""What a step will do, worked out and proved before it runs: pure, needs no process group."""

from __future__ import annotations

from pp_runtime.planning.lane_order import LaneEntry
from pp_runtime.planning.lowering import Channel, Handler, Handlers, Lowered, MethodHandler
from pp_runtime.planning.memory_report import Load, MemoryReport, human, plan_memory
from pp_runtime.planning.passes import (
    defer_receives,
    insert_communication,
    insert_reduce_grad,
    insert_unshard,
    merge_split_backward,
)
from pp_runtime.planning.plan import Plan, Wiring
from pp_runtime.planning.search import aligned, auto, compare
from pp_runtime.planning.topology import PipeInfo, StageWiring, run_stages, stage_wiring
from pp_runtime.planning.verifier import verify, verify_communication

__all__ = [
    "Channel",
    "Handler",
    "Handlers",
    "LaneEntry",
    "Load",
    "Lowered",
    "MemoryReport",
    "MethodHandler",
    "PipeInfo",
    "Plan",
    "StageWiring",
    "Wiring",
    "aligned",
    "auto",
    "compare",
    "defer_receives",
    "human",
    "insert_communication",
    "insert_reduce_grad",
    "insert_unshard",
    "merge_split_backward",
    "plan_memory",
    "run_stages",
    "stage_wiring",
    "verify",
    "verify_communication",
]
