"""What cannot be right is an error that says so, on every rank and soon, never a hang."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import api, ranks
from tests.helpers.failures import PROMPT, Met, meet
from tests.helpers.models import WIDTH
from tests.helpers.pipelines import make_schedule, make_stages

pytestmark = api.ours_only("hangs or goes on in most of these")

ROWS = 8
_mse = nn.functional.mse_loss


def _pipeline(
    indices: list[int], num_stages: int, microbatches: int = 4, schedule: str = "GPipe", loss_fn: Any = _mse
) -> Any:
    stages = make_stages({index: nn.Linear(WIDTH, WIDTH) for index in indices}, num_stages)
    return make_schedule(schedule, stages, microbatches, loss_fn)


def _step(pipeline: Any, first: bool, last: bool, rows: int = ROWS, **options: Any) -> None:
    if last:
        options.setdefault("target", torch.zeros(rows, WIDTH))
    pipeline.step(*([torch.randn(rows, WIDTH)] if first else []), **options)


class Returns(nn.Module):
    """A stage whose output is what it is told to return, beside a tensor."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(WIDTH, WIDTH), value

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return (y, self.value) if self.value != "dict" else {"hidden": y}


def both_claim_the_first_stage(rank: int) -> None:
    _step(_pipeline([0], 2), True, False)


def both_claim_a_stage_among_others(rank: int) -> None:
    _step(_pipeline([0, 2] if rank == 0 else [1, 2], 4, schedule="Interleaved1F1B"), rank == 0, rank == 1)


def stages_are_on_the_wrong_ranks(rank: int) -> None:
    _step(_pipeline([1 - rank], 2), rank == 1, rank == 0)


def ranks_disagree_on_the_number_of_stages(rank: int) -> None:
    _step(_pipeline([rank], 2 + rank), rank == 0, rank == 1)


def ranks_disagree_on_the_number_of_microbatches(rank: int) -> None:
    _step(_pipeline([rank], 2, microbatches=2 + 2 * rank), rank == 0, rank == 1)


def ranks_disagree_on_the_schedule(rank: int) -> None:
    _step(_pipeline([rank], 2, schedule=["GPipe", "1F1B"][rank]), rank == 0, rank == 1)


def one_evaluates_while_the_other_trains(rank: int) -> None:
    pipeline = _pipeline([rank], 2)
    if rank == 0:
        pipeline.eval(torch.randn(ROWS, WIDTH))
    else:
        _step(pipeline, False, True)


def a_target_without_a_loss_function(rank: int) -> None:
    _step(_pipeline([rank], 2, loss_fn=None), rank == 0, rank == 1)


def a_loss_function_without_a_target(rank: int) -> None:
    _step(_pipeline([rank], 2), rank == 0, rank == 1, **({"target": None} if rank == 1 else {}))


def a_step_without_gradients(rank: int) -> None:
    with torch.no_grad():
        _step(_pipeline([rank], 2), rank == 0, rank == 1)


def a_step_without_gradients_on_one_rank(rank: int) -> None:
    with torch.no_grad() if rank == 1 else contextlib.nullcontext():
        _step(_pipeline([rank], 2), rank == 0, rank == 1)


def fewer_rows_than_microbatches(rank: int) -> None:
    _step(_pipeline([rank], 2), rank == 0, rank == 1, rows=3)


def a_target_of_other_rows(rank: int) -> None:
    _step(_pipeline([rank], 2), rank == 0, rank == 1, **({"target": torch.zeros(3, WIDTH)} if rank == 1 else {}))


def no_input_on_the_first_rank(rank: int) -> None:
    _step(_pipeline([rank], 2), False, rank == 1)


def an_unknown_keyword(rank: int) -> None:
    _step(_pipeline([rank], 2), rank == 0, rank == 1, **({"color": 3} if rank == 1 else {}))


def losses_that_are_no_list(rank: int) -> None:
    _step(_pipeline([rank], 2), rank == 0, rank == 1, **({"losses": torch.zeros(4)} if rank == 1 else {}))


def a_loss_that_is_no_scalar(rank: int) -> None:
    _step(_pipeline([rank], 2, loss_fn=lambda output, target: output - target), rank == 0, rank == 1)


def _returning(value: Any) -> Callable[[int], None]:
    def run(rank: int) -> None:
        modules = {0: Returns(value), 1: nn.Linear(WIDTH, WIDTH)}
        stages = make_stages({rank: modules[rank]}, 2)
        _step(make_schedule("1F1B", stages, 4, _mse), rank == 0, rank == 1)

    return run


def an_output_that_is_a_dict(rank: int) -> None:
    _returning("dict")(rank)


def a_number_among_the_outputs(rank: int) -> None:
    _returning(7)(rank)


def no_microbatches(rank: int) -> None:
    _pipeline([rank], 2, microbatches=0)


def a_microbatch_count_of_text(rank: int) -> None:
    _pipeline([rank], 2, microbatches="4")  # type: ignore[arg-type]


def a_stage_index_out_of_range(rank: int) -> None:
    _pipeline([2], 2)


def a_module_in_place_of_a_stage(rank: int) -> None:
    api.schedules.ScheduleGPipe(nn.Linear(2, 2), 4, loss_fn=_mse)


# Each case, and what every rank's message says.
CASES: dict[Callable[[int], None], str] = {
    both_claim_the_first_stage: r"stage 0",
    both_claim_a_stage_among_others: r"stage 2",
    stages_are_on_the_wrong_ranks: r"stage [01]",
    ranks_disagree_on_the_number_of_stages: r"num_stages|number of stages|stages",
    ranks_disagree_on_the_number_of_microbatches: r"microbatch",
    ranks_disagree_on_the_schedule: r"GPipe|1F1B|schedule|order",
    one_evaluates_while_the_other_trains: r"eval|train|backward",
    a_target_without_a_loss_function: r"loss",
    a_loss_function_without_a_target: r"target",
    a_step_without_gradients: r"grad",
    a_step_without_gradients_on_one_rank: r"grad",
    fewer_rows_than_microbatches: r"microbatch",
    a_target_of_other_rows: r"target|microbatch|size",
    no_input_on_the_first_rank: r"argument|input",
    an_unknown_keyword: r"color",
    losses_that_are_no_list: r"losses",
    a_loss_that_is_no_scalar: r"loss|scalar",
    an_output_that_is_a_dict: r"dict",
    a_number_among_the_outputs: r"positional arguments",
    no_microbatches: r"n_microbatches",
    a_microbatch_count_of_text: r"n_microbatches",
    a_stage_index_out_of_range: r"2",
    a_module_in_place_of_a_stage: r"Linear",
}


def _meet(rank: int, name: str) -> Met | None:
    case = next(case for case in CASES if case.__name__ == name)
    return meet(lambda: case(rank))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_is_a_clear_error_on_every_rank(case: Callable[[int], None]) -> None:
    for rank, met in enumerate(ranks.run(_meet, 2, name=case.__name__)):
        assert met is not None, f"rank {rank} met no error"
        assert met.seconds < PROMPT, f"rank {rank} learnt of it after {met.seconds:.1f} s: {met.text}"
        assert any(met.is_a(kind) for kind in ("RuntimeError", "ValueError", "TypeError")), f"rank {rank}: {met.kinds}"
        assert re.search(CASES[case], met.text), f"rank {rank}: {met.text}"
