"""torch's picture of an order, each rank's actions in steps; :mod:`pp_runtime.pictures` draws them with real times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pp_runtime.errors import InvalidOrderError, PipelineTypeError, PipelineUsageError
from pp_runtime.orders import Action, ActionType, ir, leaves
from pp_runtime.pictures import LOOKS
from pp_runtime.schedules import (
    PipelineScheduleSingle,
    _add_reduce_grad,
    _add_send_recv,
    _add_unshard_reshard,
    _defer_recv_ops,
    _PipelineSchedule,
    get_schedule_class,
)
from pp_runtime.stage import _PipelineStageBase

Rows = list[list[Action | None]]

# In steps: a whole backward is as long as its two halves.
_WIDTHS: Mapping[ActionType, int] = {
    ir.FORWARD: 1,
    ir.BACKWARD_INPUT: 1,
    ir.BACKWARD_WEIGHT: 1,
    ir.FULL_BACKWARD: 2,
    ir.OVERLAP_F_B: 3,
}


class OpKey(NamedTuple):
    """What a stage does with a microbatch."""

    stage_index: int
    computation_type: ActionType
    microbatch_index: int


class _StageInNameOnly(_PipelineStageBase):
    """What making a schedule asks of a stage."""

    def __init__(self, num_stages: int, num_ranks: int) -> None:
        self.num_stages, self.group_size, self.group_rank, self.group = num_stages, num_ranks, 0, None


def get_schedule_ops(
    schedule: str | type[_PipelineSchedule],
    pp_degree: int,
    num_microbatches: int,
    num_stages_per_rank: int | None = None,
    add_spacing: bool = False,
    with_comms: bool = False,
    defer_pp_recv: bool = False,
) -> Rows:
    """Each rank's actions in a schedule, given by name or class; no process group is needed.

    ``num_stages_per_rank`` is 1 for a schedule with one stage a rank, else 2 if not given. ``add_spacing`` puts None
    where a rank waits; ``with_comms`` adds all that torch adds to an order, with ``defer_pp_recv`` receives late.
    """
    if add_spacing and with_comms:
        raise PipelineUsageError("an order is shown with add_spacing or with_comms, not with both")
    kind = get_schedule_class(schedule) if isinstance(schedule, str) else schedule
    if not (isinstance(kind, type) and issubclass(kind, _PipelineSchedule)):
        raise PipelineTypeError(f"schedule must be the name or the class of a schedule, got {schedule!r}")
    single = issubclass(kind, PipelineScheduleSingle)
    per_rank = num_stages_per_rank or (1 if single else 2)
    stages = [_StageInNameOnly(per_rank * pp_degree, pp_degree) for _ in range(per_rank)]
    made: Any = kind(stages[0] if single else stages, num_microbatches)  # type: ignore[arg-type]
    if not made.pipeline_order:
        raise PipelineUsageError(f"{kind.__name__} has no order of its own to show")
    rows = {rank: list(made.pipeline_order[rank]) for rank in range(pp_degree)}
    if not with_comms and not add_spacing:
        return list(rows.values())
    # Orders of one stage a rank are shown with their reductions, as torch shows them.
    rows = {rank: [action for action in row if action is None or action.is_compute_op] for rank, row in rows.items()}
    if add_spacing:
        return add_schedule_op_spacing([[action for action in row if action is not None] for row in rows.values()])
    rank_of = made.stage_index_to_group_rank.__getitem__
    gathered = {rank: _add_reduce_grad(_add_unshard_reshard(row), num_microbatches) for rank, row in rows.items()}
    whole = _add_send_recv(gathered, rank_of, per_rank * pp_degree)
    return [list(row) for row in (_defer_recv_ops(whole, rank_of) if defer_pp_recv else whole).values()]


def add_schedule_op_spacing(schedule: Sequence[Sequence[Action | None]]) -> Rows:
    """The rows with a None for every step in which a rank waits, a full backward taking two steps and an overlap three.

    An action of more steps than one stands once, without a None for the others. InvalidOrderError for rows that wait
    for each other.
    """
    parts = [part for row in schedule for part in _parts(row)]
    for part in parts:
        _width(part)
    last_stage = max((part.stage_index for part in parts), default=0)
    spaced: Rows = [[] for _ in schedule]
    place = [0] * len(schedule)
    free_at = [0] * len(schedule)
    ends: dict[OpKey, int] = {}
    step = since_progress = 0
    while any(place[rank] < len(row) for rank, row in enumerate(schedule)):
        for rank, row in enumerate(schedule):
            if place[rank] == len(row):
                continue
            action = row[place[rank]]
            if action is None:
                spaced[rank].append(None)
            elif free_at[rank] <= step and all(_ready(part, ends, step, last_stage) for part in leaves((action,))):
                spaced[rank].append(action)
                free_at[rank] = step + _width(action)
                end = step
                for part in leaves((action,)):
                    end += _width(part)
                    ends[OpKey(part.stage_index, part.computation_type, part.microbatch_index or 0)] = end
            else:
                continue
            place[rank] += 1
            since_progress = 0
        for rank, free in enumerate(free_at):
            if free <= step:
                spaced[rank].append(None)
        step += 1
        since_progress += 1
        if since_progress > max(_WIDTHS.values()):
            waiting = ", ".join(
                f"rank {rank} at {row[place[rank]]}" for rank, row in enumerate(schedule) if place[rank] < len(row)
            )
            raise InvalidOrderError(f"The order deadlocks: {waiting}.")
    return spaced


def _parts(row: Sequence[Action | None]) -> list[Action]:
    return list(leaves(action for action in row if action is not None))


def _width(action: Action) -> int:
    width = _WIDTHS.get(action.computation_type)
    if width is None:
        raise PipelineUsageError(f"{action} is not a compute action, and only those have a length in this picture")
    return width


def _ready(action: Action, ends: Mapping[OpKey, int], step: int, last_stage: int) -> bool:
    stage, kind, microbatch, _ = action
    makers: tuple[tuple[int, ActionType], ...]
    if kind is ir.FORWARD:
        makers = ((stage - 1, ir.FORWARD),) if stage > 0 else ()
    elif kind is ir.BACKWARD_WEIGHT:
        makers = ((stage, ir.BACKWARD_INPUT),)
    elif stage < last_stage:
        makers = ((stage + 1, ir.FULL_BACKWARD), (stage + 1, ir.BACKWARD_INPUT))
    else:
        makers = ((stage, ir.FORWARD),)
    keys = [OpKey(other, maker, microbatch or 0) for other, maker in makers]
    return not keys or any(key in ends and ends[key] <= step for key in keys)


def visualize_schedule(schedule: Sequence[Sequence[Action | None]], filename: str | None = None) -> None:
    """Draw rows of actions with matplotlib, into a file, or on the screen without one; at most 2,000 pixels wide.

    The text of an action is left out where it does not fit.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RuntimeError("Pictures need matplotlib: pip install 'pp_runtime[pictures]'.") from error
    longest = max((sum(_WIDTHS.get(a.computation_type, 1) if a else 1 for a in row) for row in schedule), default=0)
    inches = min(19.8, max(4.0, 0.45 * longest + 1))
    figure, axes = pyplot.subplots(figsize=(inches, 0.5 * len(schedule) + 1.4), dpi=100)
    points_a_step = axes.get_position().width * inches * 72 / max(longest, 1)
    kinds: set[str] = set()
    for rank, row in enumerate(schedule):
        start = 0
        for action in row:
            width = 1 if action is None else _WIDTHS.get(action.computation_type, 1)
            if action is not None:
                text = action.computation_type.value
                kinds.add(text)
                axes.barh(rank, width, left=start, color=LOOKS[text].shade(), edgecolor="white", height=0.9)
                if 0.66 * 6 * len(str(action)) < width * points_a_step:
                    axes.text(start + width / 2, rank, str(action), ha="center", va="center", fontsize=6)
            start += width
    axes.set_xlim(0, max(longest, 1))
    axes.set_yticks(range(len(schedule)), [f"Rank {rank}" for rank in range(len(schedule))])
    axes.set_ylim(len(schedule) - 0.5, -0.5)
    axes.set_xticks([])
    patches = [Patch(color=LOOKS[text].shade(), label=LOOKS[text].words) for text in LOOKS if text in kinds]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=max(len(patches), 1), frameon=False)
    if filename is None:
        pyplot.show()
    else:
        figure.savefig(filename, bbox_inches="tight", dpi=100)
    pyplot.close(figure)
