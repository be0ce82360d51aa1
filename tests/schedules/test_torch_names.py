"""Names that programs and PyTorch's own tests take from torch.distributed.pipelining give here what they give there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pp_runtime
from pp_runtime import schedules as ours
from pp_runtime.errors import InvalidOrderError
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.ir import to_torch_form
from pp_runtime.orders.placement import looped
from pp_runtime.planning.passes.communication import insert_communication

theirs = pytest.importorskip("torch.distributed.pipelining.schedules")

NAMES = [name for name, spec in ORDERS.items() if not spec.forward_only]
COUNTS = [(1, 2), (2, 1), (2, 6), (3, 8), (4, 5), (4, 12)]


def row(text: str, module: Any = ours) -> list[Any]:
    """``"0F0 - 0B0"`` as actions of a module, ``-`` for an idle step."""
    return [None if part == "-" else module._Action.from_str(part) for part in text.split()]


def texts(rows: Any) -> Any:
    if isinstance(rows, dict):
        return {rank: texts(actions) for rank, actions in rows.items()}
    return ["-" if action is None else str(action) for action in rows]


def in_torch(rows: dict[int, list[Any]]) -> dict[int, list[Any]]:
    return {rank: row(" ".join(texts(actions)), theirs) for rank, actions in rows.items()}


def orders_of(name: str) -> list[tuple[dict[int, list[Any]], tuple[int, ...], int]]:
    """The named order in torch's form, its placement and its microbatches, in all sizes that there are here."""
    found = []
    for (ranks, microbatches), per_rank in itertools.product(COUNTS, ORDERS[name].stages_per_rank_allowed or (1, 2, 3)):
        order, placement = build_order(name, ranks, ranks * per_rank, microbatches)
        found.append((to_torch_form(order), placement, microbatches))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_lowering_gives_torchs_rows_and_leaves_what_it_is_given(name: str) -> None:
    for rows, placement, microbatches in orders_of(name):
        before, torchs = texts(rows), in_torch(rows)
        mine = {rank: ours._merge_bw(actions) for rank, actions in rows.items()}
        assert texts(mine) == texts({rank: theirs._merge_bw(list(actions)) for rank, actions in torchs.items()})
        for active in (1, 2, 3):
            mine = {rank: ours._add_unshard_reshard(actions, active) for rank, actions in rows.items()}
            others = {rank: theirs._add_unshard_reshard(actions, active) for rank, actions in torchs.items()}
            assert texts(mine) == texts(others)
        mine = {rank: ours._add_reduce_grad(actions, microbatches) for rank, actions in mine.items()}
        others = {rank: theirs._add_reduce_grad(actions, microbatches) for rank, actions in others.items()}
        assert texts(mine) == texts(others)
        mine = ours._add_send_recv(mine, placement.__getitem__, len(placement))
        others = theirs._add_send_recv(others, placement.__getitem__, len(placement))
        assert texts(mine) == texts(others)
        mine = ours._defer_recv_ops(mine, placement.__getitem__)
        assert texts(mine) == texts(theirs._defer_recv_ops(others, placement.__getitem__))
        assert texts(rows) == before


@pytest.mark.parametrize("name", NAMES)
def test_idle_steps_count_as_turns_where_messages_are_placed(name: str) -> None:
    for rows, placement, _ in orders_of(name):
        mine = ours._add_send_recv(rows, placement.__getitem__, len(placement))
        others = theirs._add_send_recv(in_torch(rows), placement.__getitem__, len(placement))
        assert texts(mine) == texts(others)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DualPipeV"])  # torch cannot simulate an overlap
def test_simulated_steps_are_torchs(name: str) -> None:
    for rows, placement, _ in orders_of(name):
        whole = ours._add_send_recv(rows, placement.__getitem__, len(placement))
        mine = ours._simulate_comms_compute(whole, placement.__getitem__, len(placement))
        others = theirs._simulate_comms_compute(in_torch(whole), placement.__getitem__, len(placement))
        assert texts(mine) == texts(others)


def test_simulation_knows_overlaps_and_what_data_parallelism_adds() -> None:
    order, placement = build_order("DualPipeV", 2, 4, 6)
    rows = {rank: ours._add_reduce_grad(ours._add_unshard_reshard(row), 6) for rank, row in order.items()}
    whole = ours._add_send_recv(rows, placement.__getitem__, 4)
    played = ours._simulate_comms_compute(whole, placement.__getitem__, 4)
    assert {rank: [action for action in row if action] for rank, row in played.items()} == whole


@pytest.mark.parametrize("passes", [lambda w, p, n: ours._simulate_comms_compute(w, p, n), ours._add_send_recv])
def test_ranks_that_wait_for_each_other_are_named(passes: Any) -> None:
    with pytest.raises(InvalidOrderError, match="rank 0 at 0B0, rank 1 at 1B0"):
        passes({0: row("0F0 0B0 0F1 0B1"), 1: row("1B0 1F0")}, lambda stage: stage, 3)


def test_a_message_does_not_stand_in_for_its_send() -> None:
    with pytest.raises(InvalidOrderError, match="rank 1 at 1F0"):
        ours._simulate_comms_compute({0: row("0F0"), 1: row("1F0")}, lambda stage: stage, 2)


def test_a_receive_without_consumer_is_not_deferred() -> None:
    with pytest.raises(AssertionError, match="nothing on this rank consumes what 1RECV_F1 receives"):
        ours._defer_recv_ops({1: row("1RECV_F0 1RECV_F1 1F0")}, lambda stage: stage)


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_traces_are_torchs(name: str, tmp_path: Path) -> None:
    for rows, _, _ in orders_of(name):
        if max(map(len, rows.values())) < len(rows):
            continue  # torch's table needs as many steps as ranks
        for error in (None, 2):
            assert ours._format_pipeline_order(rows, error) == theirs._format_pipeline_order(in_torch(rows), error)
    ours._dump_chrometrace(rows, tmp_path / "ours.json")
    theirs._dump_chrometrace(in_torch(rows), tmp_path / "theirs.json")
    mine, others = (json.loads((tmp_path / file).read_text())["traceEvents"] for file in ("ours.json", "theirs.json"))
    assert [event | {"cat": ""} for event in mine] == [event | {"cat": ""} for event in others]
    assert {event["cat"] for event in mine} == {"computation"}


def test_a_table_may_have_fewer_steps_than_ranks() -> None:
    table = ours._format_pipeline_order({0: row("0F0 0B0"), 1: row("1F0"), 2: row("2F0")})
    assert [line.split() for line in table.splitlines()] == [
        ["Rank", "0", "Rank", "1", "Rank", "2"], ["Step", "0:", "0F0", "1F0", "2F0"], ["Step", "1:", "0B0"]
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_validation_gives_torchs_mapping(name: str) -> None:
    for rows, placement, microbatches in orders_of(name):
        arguments = len(rows), len(placement), microbatches
        mapping = theirs._validate_schedule(in_torch(rows), *arguments)
        assert ours._validate_schedule(rows, *arguments) == mapping == dict(enumerate(placement))
        whole = ours._add_send_recv(rows, placement.__getitem__, len(placement))
        assert ours._validate_schedule(whole, *arguments) == mapping


@pytest.mark.parametrize(
    ("rows", "ranks", "stages", "says"),
    [
        ({0: "0F0 0B0"}, 2, 1, "ranks 0 to 1"),
        ({0: "0F0 0F1 0B0"}, 1, 1, "no F|no B"),
        ({0: "0B0 0F0 0F1 0B1"}, 1, 1, "0F0 has not run"),
        ({0: "0F0 0F1 0I0 0W0 0I1"}, 1, 1, "no W of microbatch 1"),
        ({0: "0F0 0F1 0B0 0B1", 1: "0F0"}, 2, 1, "a stage has one rank"),
        ({0: "0F0 0F1"}, 1, 1, "no B"),
        ({0: "0F0 0F1 0B0 0B1"}, 1, 2, "for 1 stages, not for 2"),
        ({0: "0F0 0F1 0B0 0B1 0RECV_B0"}, 1, 1, "no such message"),
    ],
)
def test_invalid_orders_are_assertion_errors_as_torchs(rows: Any, ranks: int, stages: int, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        ours._validate_schedule({rank: row(text) for rank, text in rows.items()}, ranks, stages, 2)


def test_what_torch_does_not_see_is_found() -> None:
    circle = {0: row("0F0 0B0 0F1 0B1"), 1: row("1F1 1F0 1B1 1B0")}
    theirs._validate_schedule(in_torch(circle), 2, 2, 2)
    with pytest.raises(InvalidOrderError, match="deadlocks"):
        ours._validate_schedule(circle, 2, 2, 2)
    with pytest.raises(InvalidOrderError, match="not an action"):
        ours._validate_schedule({0: ["0F0"]}, 1, 1, 1)


def test_compiled_stages_are_refused_by_no_schedule() -> None:
    compiled = [SimpleNamespace(submod=torch.compile(torch.nn.Linear(1, 1)))]
    with pytest.raises(RuntimeError, match="torch.compile"):
        theirs._check_torch_compile_compatibility(compiled, "DualPipeV")
    assert ours._check_torch_compile_compatibility(compiled, "DualPipeV") is None


def test_short_names_are_torchs() -> None:
    assert [ours.F, ours.B, ours.I, ours.W] == [theirs.F, theirs.B, theirs.I, theirs.W]
    assert str(ours._TARGET_CHUNK_SPEC) == str(theirs._TARGET_CHUNK_SPEC)
    assert pp_runtime._ScheduleForwardOnly is ours._ScheduleForwardOnly
    for kind in ours._ComputationType:
        assert ours._requires_reduce_grad(kind) == theirs._requires_reduce_grad(theirs._ComputationType(kind.value))
    assert ours._get_profiler_function_name(ours._Action(2, ours.F, 1)) == "PP:2F1"


@pytest.mark.parametrize(
    "text", ["1F0", "2I1", "0W3", "0B3", "1UNSHARD", "3RESHARD", "1REDUCE_GRAD", "2SEND_B2", "1RECV_F1"]
)
def test_actions_compare_with_torchs(text: str) -> None:
    mine, other = ours._Action.from_str(text), theirs._Action.from_str(text)
    assert mine == other and hash(mine) == hash(other) and str(mine) == str(other) == text
    assert mine == ours._Action(*mine[:3]) != ours._Action(9, *mine[1:])


def test_sorted_actions_are_sorted_as_torchs() -> None:
    for rows, _, _ in orders_of("InterleavedZeroBubble"):
        actions = [action for row in rows.values() for action in row if action]
        assert texts(sorted(actions)) == texts(sorted(row(" ".join(texts(actions)), theirs)))


@pytest.mark.parametrize("text", ["F0", "1X0", "one", "0F0x"])
def test_text_that_is_no_action_is_a_runtime_error_as_torchs(text: str) -> None:
    with pytest.raises(RuntimeError, match=f"'{text}' is not an action"):
        ours._Action.from_str(text)


def test_an_unknown_type_is_a_runtime_error_as_torchs() -> None:
    assert ours._ComputationType.from_str("SEND_F") is ours.SEND_F
    with pytest.raises(RuntimeError, match="'Q' is not an action type"):
        ours._ComputationType.from_str("Q")


def test_early_receives_are_those_that_the_runtime_places_late() -> None:
    order, placement = build_order("Interleaved1F1B", 2, 4, 4)
    early = ours._add_send_recv(order, placement.__getitem__, 4)
    late = insert_communication(order, placement)
    assert placement == looped(2, 4) and early != late
    assert {rank: sorted(row) for rank, row in early.items()} == {rank: sorted(row) for rank, row in late.items()}
