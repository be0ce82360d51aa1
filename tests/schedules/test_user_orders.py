"""Orders that a user loads: stages where the order puts them, any valid order of actions, sends and receives too."""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pp_runtime.orders.catalogue import build_order
from pp_runtime.orders.csv_files import dump_order
from pp_runtime.planning.passes.communication import insert_communication
from pp_runtime.planning.passes.data_parallel import insert_unshard
from tests.helpers import api, ranks
from tests.helpers.fakes import FakeStage
from tests.helpers.pipelines import Setting, Twins, make_stages

MICROBATCHES = 4
Rows = list[list[str]]


def _load(path: str, form: str, stages: list[Any], microbatches: int, loss_fn: Any) -> Any:
    schedule = api.schedules._PipelineScheduleRuntime(stages, microbatches, loss_fn=loss_fn)
    schedule._load_csv(path, format=form)
    return schedule


def _train(rank: int, path: str, owners: list[int], form: str = "compute_only", model: str = "mlp") -> list[str]:
    make = functools.partial(_load, path, form)
    twins = Twins(rank, Setting("CSV", MICROBATCHES, model=model), owners=owners, make=make)
    found = []
    for number in range(2):
        found += twins.train(f"step {number}", twins.example.batch(2 * MICROBATCHES, number))
    return found


def _all(stage: int, kind: str, microbatches: list[int] | None = None) -> list[str]:
    return [f"{stage}{kind}{index}" for index in (microbatches or range(MICROBATCHES))]


def _unbalanced() -> tuple[Rows, list[int]]:
    """Rank 0 holds stages 0, 1 and 4, rank 1 stages 2 and 3."""
    first = [*_all(0, "F"), *_all(1, "F"), *_all(4, "F"), *_all(4, "B"), *_all(1, "B"), *_all(0, "B")]
    return [first, [*_all(2, "F"), *_all(3, "F"), *_all(3, "B"), *_all(2, "B")]], [0, 0, 1, 1, 0]


def _consecutive() -> tuple[Rows, list[int]]:
    """Each rank holds two stages in a row."""
    first = [*_all(0, "F"), *_all(1, "F"), *_all(1, "B"), *_all(0, "B")]
    return [first, [*_all(2, "F"), *_all(3, "F"), *_all(3, "B"), *_all(2, "B")]], [0, 0, 1, 1]


def _delayed_weights() -> tuple[Rows, list[int]]:
    """All weight gradients at the very end, in an order of their own."""
    late = [2, 0, 3, 1]
    rows = [[*_all(stage, "F"), *_all(stage, "I"), *_all(stage, "W", late)] for stage in (0, 1)]
    return rows, [0, 1]


def _some_split() -> tuple[Rows, list[int]]:
    """Some microbatches with a full backward, some with a split one."""
    kinds = ["B0", "I1", "W1", "B2", "I3"]
    return [[*_all(stage, "F"), *(f"{stage}{kind}" for kind in kinds), f"{stage}W3"] for stage in (0, 1)], [0, 1]


def _shuffled() -> tuple[Rows, list[int]]:
    """Forwards and backwards of the microbatches in a random order, equal on both ranks."""
    draw = random.Random(7)
    forwards, backwards = (draw.sample(range(MICROBATCHES), MICROBATCHES) for _ in range(2))
    return [[*_all(stage, "F", forwards), *_all(stage, "B", backwards)] for stage in (0, 1)], [0, 1]


def _reversed_ranks() -> tuple[Rows, list[int]]:
    """The first stage on the last rank."""
    return [[*_all(1, "F"), *_all(1, "B")], [*_all(0, "F"), *_all(0, "B")]], [1, 0]


ORDERS = {order.__name__.strip("_"): order for order in (
    _unbalanced, _consecutive, _delayed_weights, _some_split, _shuffled, _reversed_ranks,
)}  # fmt: skip


def _write(path: Path, rows: Rows) -> str:
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ORDERS)
def test_a_loaded_order_equals_the_plain_model(name: str, tmp_path: Path) -> None:
    if api.IS_TORCH and name in ("shuffled", "delayed_weights", "consecutive", "unbalanced", "reversed_ranks"):
        pytest.skip("torch: hands losses out by their order of arrival, or expects looped placements")
    rows, owners = ORDERS[name]()
    assert ranks.run(_train, 2, path=_write(tmp_path / "order.csv", rows), owners=owners) == [[], []]


def _dump(rank: int, folder: str, schedule: str, stages_per_rank: int) -> list[int]:
    """Write both forms of a named schedule's order; give the rank of every stage."""
    setting = Setting(schedule, MICROBATCHES, stages_per_rank)
    twins = Twins(rank, setting)
    if rank == 0:
        twins.schedule._dump_csv(f"{folder}/compute_only.csv", format="compute_only")
        twins.schedule._dump_csv(f"{folder}/compute_comms.csv", format="compute_comms")
    mapping = twins.stages[0].stage_index_to_group_rank
    return [mapping[stage] for stage in range(twins.num_stages)]


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
def test_a_dumped_order_trains_when_loaded_again(schedule: str, form: str, tmp_path: Path) -> None:
    if api.IS_TORCH and form == "compute_only":
        pytest.skip("torch: writes empty cells that it reads back as time steps of its own")
    owners, _ = ranks.run(_dump, 2, folder=str(tmp_path), schedule=schedule, stages_per_rank=2)
    assert ranks.run(_train, 2, path=str(tmp_path / f"{form}.csv"), owners=owners, form=form) == [[], []]


def _break(rows: Rows) -> dict[str, tuple[Rows, str]]:
    """Broken variants of an order and what must be named."""
    without = [[action for action in rows[0] if action != "0B2"], rows[1]]
    doubled = [rows[0], [*rows[1], "1B1"]]
    early = [["0W0", *rows[0]], rows[1]]
    elsewhere = [rows[0], [*rows[1], "0F0"]]
    beyond = [[*rows[0], "0F9"], rows[1]]
    junk = [["0F0garbage", *rows[0][1:]], rows[1]]
    return {
        "missing": (without, r"B .*microbatch 2 on stage 0"),
        "doubled": (doubled, "1B1"),
        "a weight before its input": (early, "0W0"),
        "a stage of another rank": (elsewhere, "[Ss]tage 0"),
        "a microbatch out of range": (beyond, "0F9"),
        "junk": (junk, "0F0garbage"),
    }


def _refuse(rank: int, path: str) -> str:
    make = functools.partial(_load, path, "compute_only")
    try:
        twins = Twins(rank, Setting("CSV", MICROBATCHES), owners=[0, 1], make=make)
        twins.train("step", twins.example.batch(2 * MICROBATCHES, 0))
    except ValueError as error:
        return str(error)
    return "accepted"


def _run_forwards(rank: int, path: str, form: str, with_loss: bool) -> list[Any]:
    """Two batches forward through four looped stages; a loss is computed, and no gradient."""
    torch.manual_seed(2)
    plain = [nn.Linear(3, 3) for _ in range(4)]
    stages = make_stages({index: plain[index] for index in (rank, rank + 2)}, 4)
    schedule = _load(path, form, stages, MICROBATCHES, nn.functional.mse_loss if with_loss else None)
    found: list[Any] = []
    for rows in (8, 5):
        x, y = torch.randn(rows, 3), torch.randn(rows, 3)
        losses: list[Any] = []
        last = {"target": y, "losses": losses} if with_loss and rank == 1 else {}
        output = schedule.step(*([x] if rank == 0 else []), **last)
        if rank == 1:
            found.append(torch.allclose(output, nn.Sequential(*plain)(x)))
            found.append(len(losses) == (MICROBATCHES if with_loss else 0))
            pairs = zip(losses, output.tensor_split(MICROBATCHES), y.tensor_split(MICROBATCHES), strict=False)
            found += [torch.equal(loss, nn.functional.mse_loss(piece, target)) for loss, piece, target in pairs]
    found += [weight.grad is None for stage in stages for weight in stage.submod.parameters()]
    return found


@api.ours_only("an order needs its backwards")
@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("form", ["compute_only", "compute_comms"])
def test_an_order_without_backwards_runs_forward(form: str, with_loss: bool, tmp_path: Path) -> None:
    order, placement = build_order("ForwardOnly", 2, 4, MICROBATCHES)
    whole = insert_communication(insert_unshard(order), placement, backward=False)
    dump_order(tmp_path / "order.csv", order if form == "compute_only" else whole)
    found = ranks.run(_run_forwards, 2, path=str(tmp_path / "order.csv"), form=form, with_loss=with_loss)
    assert all(map(all, found)) and len(found[1]) >= 8


@api.ours_only("an order needs its backwards")
def test_an_order_with_some_of_its_backwards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "order.csv").write_text("0F0,0SEND_F0,0RECV_B0,0B0\r\n1RECV_F0,1F0,1B0,1SEND_B0\r\n")
    stages = [FakeStage(0, 2, 0, 2)]
    _load(str(tmp_path / "order.csv"), "compute_comms", stages, 1, None)
    (tmp_path / "order.csv").write_text("0F0,0SEND_F0\r\n1RECV_F0,1F0,1B0\r\n")
    with pytest.raises(ValueError, match="no B .nor I and W. of microbatch 0 on stage 0"):
        _load(str(tmp_path / "order.csv"), "compute_comms", stages, 1, None)


@api.ours_only("checks little")
def test_a_broken_order_is_refused_with_the_action_named(tmp_path: Path) -> None:
    rows = [[*_all(stage, "F"), *_all(stage, "B")] for stage in (0, 1)]
    for name, (broken, named) in _break(rows).items():
        path = _write(tmp_path / "broken.csv", broken)
        for text in ranks.run(_refuse, 2, path=path):
            assert re.search(named, text), f"{name}: {text}"


def _train_with_an_own_order(rank: int, name: str) -> list[str]:
    """A subclass of a named schedule whose order is all forwards first, last microbatch first."""

    class Own(api.schedules.get_schedule_class(name)):  # type: ignore[misc]
        def _calculate_single_rank_operations(self, rank: int) -> list[Any]:
            row = [action for action in super()._calculate_single_rank_operations(rank) if action is not None]
            held = sorted({action.stage_index for part in row for action in (part.sub_actions or (part,))})
            text = [f"{s}F{m}" for s in held for m in reversed(range(MICROBATCHES))]
            text += [f"{s}B{m}" for s in reversed(held) for m in range(MICROBATCHES)]
            return [api.schedules._Action.from_str(each) for each in text]

    owners = [0, 1, 0, 1]
    make = lambda stages, count, loss_fn: Own(stages, count, loss_fn=loss_fn)  # noqa: E731
    twins = Twins(rank, Setting(name, MICROBATCHES, 2), owners=owners, make=make)
    assert str(twins.schedule.pipeline_order[rank][0]) == f"{rank}F3", twins.schedule.pipeline_order
    return [line for step in range(2) for line in twins.train(f"step {step}", twins.example.batch(8, step))]


@api.ours_only("builds some of its schedules in other methods")
@pytest.mark.parametrize("name", ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble"])
def test_a_subclass_that_calculates_its_ranks_operations_has_them_run(name: str) -> None:
    assert ranks.run(_train_with_an_own_order, 2, name=name) == [[]] * 2
