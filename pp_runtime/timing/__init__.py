"""When a step would run, and when it ran: costs, simulation, timelines."""

from __future__ import annotations

from pp_runtime.timing.as_planned import as_planned
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.measured import read_costs
from pp_runtime.timing.network import has_communication
from pp_runtime.timing.peaks import activation_peaks
from pp_runtime.timing.simulation import Simulation, simulate
from pp_runtime.timing.timeline import Timeline

__all__ = [
    "Costs",
    "Simulation",
    "Timeline",
    "activation_peaks",
    "as_planned",
    "has_communication",
    "read_costs",
    "simulate",
]
