"""The functions of torch.distributed.pipelining._schedule_visualizer give here what they give there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pp_runtime import _schedule_visualizer as ours
from pp_runtime.errors import InvalidOrderError, PipelineUsageError
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.schedules import FORWARD, Schedule1F1B, _Action

theirs = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")

SINGLE = ["GPipe", "1F1B"]
MULTI = ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


def texts(rows: Any) -> list[list[str]]:
    return [["-" if action is None else str(action) for action in row] for row in rows]


@pytest.mark.parametrize("name", MULTI)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8)])
def test_the_actions_of_a_schedule_are_torchs(name: str, ranks: int, microbatches: int) -> None:
    def compute_only(rows: Any) -> list[list[str]]:
        return [[text for text in row if text != "-"] for row in texts(rows)]

    arguments = (name, ranks, microbatches)
    assert compute_only(ours.get_schedule_ops(*arguments)) == compute_only(theirs.get_schedule_ops(*arguments))
    for defer in (False, True):
        mine = ours.get_schedule_ops(*arguments, with_comms=True, defer_pp_recv=defer)
        assert sorted(map(sorted, texts(mine))) == sorted(
            map(sorted, texts(theirs.get_schedule_ops(*arguments, with_comms=True, defer_pp_recv=defer)))
        )


def test_schedules_with_one_stage_a_rank_have_messages_too() -> None:
    for kind in ("1F1B", Schedule1F1B):
        rows = texts(ours.get_schedule_ops(kind, 2, 2, with_comms=True))
        assert rows[0][:2] == ["0UNSHARD", "0F0"]
        assert {"1RECV_F1", "1SEND_B1", "1REDUCE_GRAD", "1RESHARD"} <= set(rows[1])
    assert "0REDUCE_GRAD" in texts(ours.get_schedule_ops("GPipe", 2, 3))[0]


@pytest.mark.parametrize("name", [name for name, spec in ORDERS.items() if not spec.forward_only])
def test_waits_are_where_torch_shows_them(name: str) -> None:
    for ranks, microbatches in ((2, 4), (3, 5), (4, 8)):
        stages = ranks * (ORDERS[name].stages_per_rank_allowed or (2,))[0]
        order, placement = build_order(name, ranks, stages, microbatches)
        rows = [list(order[rank]) for rank in range(ranks)]
        mine = ours.add_schedule_op_spacing(rows)
        assert [[action for action in row if action] for row in mine] == rows
        expected = theirs.add_schedule_op_spacing([[theirs._Action.from_str(str(a)) for a in row] for row in rows])
        # Once a rank has ended before one of a higher number, torch shows the higher ones' actions in other rows.
        ended = [
            place
            for rank, row in enumerate(expected)
            for place, action in enumerate(row)
            if action is not None and placement[(action.sub_actions or (action,))[0].stage_index] != rank
        ]
        assert [row[: min(ended, default=None)] for row in texts(mine)] == [
            row[: min(ended, default=None)] for row in texts(expected)
        ]
        assert not ended or name in ("ZBVZeroBubble", "ZB2P", "VHalf", "VMin", "DualPipeV")


def test_spacing_names_the_ranks_that_wait_for_each_other() -> None:
    rows = [[_Action.from_str(text) for text in row.split()] for row in ("0F0 0B0", "1B0 1F0")]
    with pytest.raises(InvalidOrderError, match="rank 0 at 0B0, rank 1 at 1B0"):
        ours.add_schedule_op_spacing(rows)
    with pytest.raises(PipelineUsageError, match="0SEND_F0 is not a compute action"):
        ours.add_schedule_op_spacing([[_Action.from_str("0SEND_F0")]])


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ValueError, match="not with both"):
        ours.get_schedule_ops("GPipe", 2, 2, add_spacing=True, with_comms=True)
    with pytest.raises(TypeError, match="name or the class"):
        ours.get_schedule_ops(int, 2, 2)
    with pytest.raises(ValueError, match="PipelineScheduleMulti has no order"):
        ours.get_schedule_ops("PipelineScheduleMulti", 2, 2)
    with pytest.raises(ValueError, match="one stage a rank"):
        ours.get_schedule_ops("GPipe", 2, 2, num_stages_per_rank=2)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    for number, spacing in enumerate((True, False)):
        rows = ours.get_schedule_ops("DualPipeV", 2, 8, add_spacing=spacing, with_comms=not spacing)
        ours.visualize_schedule(rows, str(tmp_path / f"{number}.png"))
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_fits_a_page(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    ours.visualize_schedule(ours.get_schedule_ops("Interleaved1F1B", 8, 32, add_spacing=True), str(tmp_path / "8.png"))
    assert 1500 < int.from_bytes((tmp_path / "8.png").read_bytes()[16:20], "big") <= 2000


def test_a_key_names_what_a_stage_does_with_a_microbatch() -> None:
    key = ours.OpKey(1, FORWARD, 2)
    assert tuple(key) == tuple(theirs.OpKey(1, theirs._ComputationType.FORWARD, 2))
