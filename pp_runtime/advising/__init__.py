"""What a pipeline of a model would take: which schedule, how many microbatches, before anything is launched."""

from __future__ import annotations

from pp_runtime.advising.advice import Advice, Choice, RankBytes
from pp_runtime.advising.advise import advise
from pp_runtime.advising.command import print_advice
from pp_runtime.advising.stage_costs import LinkSpeed
from pp_runtime.advising.tally import DeviceSpeed

__all__ = [
    "Advice",
    "Choice",
    "DeviceSpeed",
    "LinkSpeed",
    "RankBytes",
    "advise",
    "print_advice",
]
