"""Who is where in a step, who failed, who waits for whom, and what is raised at its end."""

from __future__ import annotations

from pp_runtime.running.oversight.endings import end_of_step
from pp_runtime.running.oversight.whereabouts import Lookout

__all__ = [
    "Lookout",
    "end_of_step",
]
