"""The schedule whose order is searched for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders import Order, Placement, looped
from pp_runtime.planning import auto
from pp_runtime.schedules.named import _NamedMultiSchedule
from pp_runtime.stage import _PipelineStageBase
from pp_runtime.timing import Costs, Timeline

if TYPE_CHECKING:
    from typing_extensions import Self


class ScheduleAuto(_NamedMultiSchedule):
    """Searches for the shortest order under the given costs and memory.

    ``costs`` are the times of F, I, W, B and transfers, given or measured (:class:`pp_runtime.timing.Costs`); all ranks
    must pass the same ones. ``memory_cap`` is the most activations that a rank may hold at once, None for no cap.
    ``placement[stage]`` is the rank of each stage: looped if not given; ``pp_runtime.orders.v_shaped``
    gives the other common one. The other arguments are those of the named schedules with several stages a rank.
    """

    def __init__(
        self,
        stages: list[_PipelineStageBase],
        n_microbatches: int,
        *args: Any,
        costs: Costs | None = None,
        memory_cap: int | None = None,
        placement: Placement | None = None,
        **kwargs: Any,
    ) -> None:
        self._costs, self._memory_cap, self._wanted_placement = costs, memory_cap, placement
        super().__init__(stages, n_microbatches, *args, **kwargs)

    @classmethod
    def from_timeline(
        cls, timeline: Timeline, stages: list[_PipelineStageBase], n_microbatches: int, *args: Any, **kwargs: Any
    ) -> Self:
        """Search under the costs that a measured step had: the median times of a timeline that was gathered.

        The step may have been that of any schedule. One of more or fewer stages gives its costs recut
        (:meth:`pp_runtime.timing.Costs.recut`). The other arguments are those of the class, without ``costs``.
        PipelineUsageError if the timeline has not all ranks.
        """
        return cls(stages, n_microbatches, *args, costs=_costs_for(stages, timeline), **kwargs)

    def _order_builder(self) -> None:
        """The search takes longer than the order is large, so the order is kept."""

    def _build_order(self) -> tuple[Order, Placement]:
        ranks, stages = self.pp_group_size, self._num_stages
        if self._wanted_placement is None:
            placement = looped(ranks, stages)
        else:
            placement = tuple(self._wanted_placement)
            if len(placement) != stages or set(placement) != set(range(ranks)):
                raise PipelineUsageError(
                    f"placement must give each of {stages} stages one of {ranks} ranks and leave no rank without a "
                    f"stage, got {placement}"
                )
        return auto(ranks, stages, self._n_microbatches, self._costs, self._memory_cap, placement), placement


def _costs_for(stages: Sequence[_PipelineStageBase], timeline: Timeline) -> Costs:
    if not stages:
        return timeline.costs()  # the class says what is wrong
    ranks, num_stages = stages[0].group_size, stages[0].num_stages
    if len(timeline.ranks) < ranks:
        raise PipelineUsageError(
            f"The timeline shows {len(timeline.ranks)} of the pipeline's {ranks} ranks: call its gather() first, on "
            "every rank"
        )
    return timeline.costs().recut(timeline.num_stages, num_stages)
