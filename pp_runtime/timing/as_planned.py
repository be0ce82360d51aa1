"""What a measured step would have been with nothing between its actions."""

from __future__ import annotations

from pp_runtime.orders import Action, ir
from pp_runtime.timing.simulation import simulate
from pp_runtime.timing.timeline import Timeline


def as_planned(timeline: Timeline) -> Timeline:
    """The same actions of each rank in the same sequence, each at the median time of its kind on its stage.

    The timeline is of all ranks (:meth:`Timeline.gather`), of stages that form a chain. ValueError for one that is not.
    """
    order: dict[int, list[Action]] = {}
    for rank in timeline.ranks:
        actions = [span.parsed() for span in timeline.of_rank(rank)]
        order[rank] = [action for action in actions if action.computation_type in ir.COMPUTE_TYPES]
    return simulate(order, timeline.costs()).timeline()
