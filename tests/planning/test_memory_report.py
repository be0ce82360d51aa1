"""The memory report: the numbers of known schedules, flat in the microbatches, the same planned and measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pp_runtime.__main__ import main
from pp_runtime.errors import PipelineUsageError
from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.orders.edges import Edge, adjacent_edges
from pp_runtime.planning.memory_report import Amount, Load, MemoryReport, human, plan_memory
from pp_runtime.planning.plan import Plan, Wiring
from pp_runtime.running.meter import loads_of
from tests.helpers import ranks
from tests.helpers.models import rows_of_floats
from tests.helpers.pipelines import held_by, make_schedule, make_stages, step

KIB = torch.empty(256, device="meta")
RANKS, MICROBATCHES, ROWS = 2, 6, 3


def report(name: str, num_ranks: int, num_stages: int, microbatches: int, **options: Any) -> MemoryReport:
    order, placement = build_order(name, num_ranks, num_stages, microbatches)
    wiring = Wiring(adjacent_edges(num_stages), {})
    plan = Plan(order, placement, microbatches, wiring, has_backward=name != "ForwardOnly")
    return plan_memory(plan, loads_of(KIB, wiring.edges), **options)


def test_1f1b_keeps_what_its_depth_needs() -> None:
    rows = report("1F1B", 4, 4, 64, torch_keeps_sent=False).ranks
    assert [row.kept_inputs.count for row in rows] == [0, 3, 2, 1]
    assert [row.activations.count for row in rows] == [0, 3 + 2, 2 + 2, 1 + 2]  # two spare ones a channel
    assert [row.gradients.count for row in rows] == [1 + 2, 1 + 2, 1 + 2, 0]
    assert [row.torch_buffers.count for row in rows] == [64, 128, 128, 64]
    assert all(row.torch_sent == Amount() for row in rows)
    assert rows[1].activations.bytes == 5 * 1024


@pytest.mark.parametrize("name", sorted(set(ORDERS) - {"GPipe", "LoopedBFS", "ForwardOnly"}))
def test_slots_do_not_grow_with_the_microbatches(name: str) -> None:
    num_stages = 4 * (ORDERS[name].stages_per_rank_allowed or (2,))[0]

    def sizes(microbatches: int) -> list[tuple[Amount, ...]]:
        rows = report(name, 4, num_stages, microbatches).ranks
        return [(row.activations, row.gradients, row.kept_inputs) for row in rows]

    assert sizes(40) == sizes(80)


def test_gpipe_may_keep_every_input_and_torch_keeps_more() -> None:
    first, last = report("GPipe", 2, 2, 10).ranks
    assert last.kept_inputs == Amount(10, 10 * 1024)
    assert first.torch_buffers.count == last.torch_buffers.count == 10
    assert first.torch_sent.count == last.torch_sent.count == 10


def test_a_neighbour_on_the_same_rank_takes_no_slot_but_its_input_is_kept() -> None:
    (row,) = report("Interleaved1F1B", 1, 2, 4).ranks
    assert row.activations == row.gradients == row.torch_sent == Amount()
    assert row.kept_inputs.count >= 1
    assert row.torch_buffers.count == 2 * 4


def test_forwards_alone_keep_nothing_for_a_backward() -> None:
    order, placement = build_order("GPipe", 3, 3, 20)
    forwards = {rank: [a for a in actions if a.computation_type.value == "F"] for rank, actions in order.items()}
    wiring = Wiring(adjacent_edges(3), {})
    plan = Plan(forwards, placement, 20, wiring, has_backward=False)
    for row in plan_memory(plan, loads_of(KIB, wiring.edges)).ranks:
        assert row.gradients == Amount()
        assert row.kept_inputs.count <= 1
        assert row.activations.count <= 3


def test_edges_of_different_loads_are_counted_each_for_itself() -> None:
    edges = [Edge(0, 1), Edge(0, 2), Edge(1, 2)]
    order, placement = build_order("GPipe", 3, 3, 4)
    plan = Plan(order, placement, 4, Wiring(tuple(edges), {}))
    integers = torch.empty(8, dtype=torch.int64, device="meta")
    loads = loads_of({(0, 1): KIB, (1, 2): [KIB, KIB], (0, 2): [KIB, integers]}, edges)
    assert loads[Edge(0, 2)] == Load(1024 + 64, 1024)
    first, middle, last = plan_memory(plan, loads).ranks
    assert last.kept_inputs == Amount(4, 4 * (3 * 1024 + 64))
    assert middle.kept_inputs == Amount(4, 4 * 1024)
    assert first.torch_buffers == Amount(2 * 4, 4 * 2 * 1024)


def test_a_signature_that_leaves_an_edge_out_is_refused_by_its_name() -> None:
    with pytest.raises(PipelineUsageError, match="from stage 1 to stage 2"):
        loads_of({(0, 1): KIB}, adjacent_edges(3))
    with pytest.raises(PipelineUsageError, match="made of tensors"):
        loads_of([(4, 4)], adjacent_edges(2))  # type: ignore[list-item]


def test_bytes_are_written_with_a_unit() -> None:
    assert [human(count) for count in (0, 999, 1536, 5 * 2**20, 2**33)] == ["0 B", "999 B", "1.5 KiB", "5 MiB", "8 GiB"]


def test_the_command_line_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "memory 1f1b --ranks 4 --microbatches 64 --shape 8,4096,1024 --dtype bfloat16".split()
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "5 (320 MiB)" in shown and "128 (8 GiB)" in shown
    assert main([*arguments[:-1], "bloat16"]) == 1
    assert "bloat16" in capsys.readouterr().err


class Doubled(nn.Module):
    """Gives its input and an integer tensor on; the last stage gives the input alone."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), last

    def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
        y = self.linear(x)
        return y if self.last else (y, torch.arange(8))


def _planned_and_measured(rank: int, schedule: str, stages_per_rank: int) -> tuple[str, str, int]:
    count = RANKS * stages_per_rank
    modules = {index: Doubled(index == count - 1) for index in held_by(rank, schedule, RANKS, stages_per_rank)}
    stages = make_stages(modules, count)
    pipeline = make_schedule(schedule, stages, MICROBATCHES, nn.functional.mse_loss)
    with pytest.raises(RuntimeError, match="after the first step"):
        pipeline.memory_report()
    sent = [torch.empty(ROWS, 4, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")]
    planned = pipeline.memory_report(sent)
    for number, method in enumerate(["eval", "step", "step"]):
        step(pipeline, stages, rows_of_floats(ROWS * MICROBATCHES, number), method)
    (measured,) = pipeline.memory_report().ranks
    return repr(planned.ranks[rank]), repr(measured), len(planned.ranks)


@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("1F1B", 1), ("Interleaved1F1B", 2), ("ZBVZeroBubble", 2)])
def test_what_a_step_measured_is_what_the_signature_gave(schedule: str, stages_per_rank: int) -> None:
    for planned, measured, rows in ranks.run(
        _planned_and_measured, RANKS, schedule=schedule, stages_per_rank=stages_per_rank
    ):
        assert measured == planned
        assert rows == RANKS
