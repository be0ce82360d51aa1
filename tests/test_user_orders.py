"""Orders that a user loads: stages where the order puts them, any valid order of actions, sends and receives too."""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests import api, ranks
from tests.pipelines import Setting, Twins

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


@api.ours_only("checks little")
def test_a_broken_order_is_refused_with_the_action_named(tmp_path: Path) -> None:
    rows = [[*_all(stage, "F"), *_all(stage, "B")] for stage in (0, 1)]
    for name, (broken, named) in _break(rows).items():
        path = _write(tmp_path / "broken.csv", broken)
        for text in ranks.run(_refuse, 2, path=path):
            assert re.search(named, text), f"{name}: {text}"
