"""What a step takes (split as told, cut already, nested, by keyword) and gives (losses, outputs merged as told)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import api, ranks, reference
from tests.helpers.models import WIDTH
from tests.helpers.pipelines import Setting, Twins, make_schedule, make_stages

MICROBATCHES = 3
_mse = nn.functional.mse_loss


def _cut_already(rank: int, schedule: str, stages_per_rank: int) -> list[str]:
    """arg_mbs and target_mbs, as the plain model's microbatches."""
    twins = Twins(rank, Setting(schedule, MICROBATCHES, stages_per_rank))
    found = []
    for number in range(2):
        batch = twins.example.batch(10, number)
        expected = reference.train_step(twins.example.stages, batch, _mse, MICROBATCHES)
        twins.optimizers[1].zero_grad()  # the pipeline's: the plain model's gradients are fresh
        pieces = reference.microbatches_of(batch, MICROBATCHES)
        options: dict[str, Any] = {"arg_mbs": [piece.args for piece in pieces]} if 0 in twins.mine else {}
        losses: list[Tensor] = []
        if twins.holds_last:
            options |= {"target_mbs": [piece.target for piece in pieces], "losses": losses}
        output = twins.schedule.step(**options)
        if twins.holds_last:
            found += reference.differences("output", output, expected.outputs)
            found += reference.differences("losses", losses, expected.losses)
        found += twins.differences(f"step {number}")
    return found


@api.ours_only("2.14 and later")
@pytest.mark.parametrize(("schedule", "stages_per_rank"), [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2)])
def test_inputs_that_are_cut_already(schedule: str, stages_per_rank: int) -> None:
    assert ranks.run(_cut_already, 2, schedule=schedule, stages_per_rank=stages_per_rank) == [[], []]


class Columns(nn.Module):
    """Works on (features, rows): the batch is the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, shift: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        y = self.linear(x.t()).t().contiguous()
        return y if shift is None else y + shift[:, None] + bias


def _split_by_columns(rank: int) -> list[str]:
    """Inputs and keyword inputs split along other dimensions, or given to all; outputs merged along the second."""
    torch.manual_seed(3)
    plain = [Columns(), Columns()]
    stages = make_stages({rank: plain[rank]}, 2)
    spec, copy = api.microbatch.TensorChunkSpec, api.microbatch._Replicate
    schedule = make_schedule(
        "GPipe",
        stages,
        MICROBATCHES,
        None,
        args_chunk_spec=(spec(1),) if rank == 0 else None,
        kwargs_chunk_spec={"shift": copy(), "bias": spec(1)} if rank == 0 else None,
        output_merge_spec=spec(1),
    )
    x, shift, bias = torch.randn(WIDTH, 6), torch.randn(WIDTH), torch.randn(1, 6)
    with torch.no_grad():
        output = schedule.step(*([x] if rank == 0 else []), **({"shift": shift, "bias": bias} if rank == 0 else {}))
        expected = plain[1](plain[0](x, shift, bias))
    return reference.differences("output", output, expected, exact=False) if rank == 1 else []


def _train_by_columns(rank: int) -> list[str]:
    """The batch is the second dimension of inputs, targets and outputs."""
    torch.manual_seed(3)
    plain = nn.Sequential(Columns(), Columns())
    stages = make_stages({rank: copy.deepcopy(plain[rank])}, 2)
    spec = api.microbatch.TensorChunkSpec
    specs = {"args_chunk_spec": (spec(1),), "target_chunk_spec": spec(1), "output_merge_spec": spec(1)}
    schedule = make_schedule("1F1B", stages, MICROBATCHES, _mse, **specs)
    x, y = torch.randn(WIDTH, 8), torch.randn(WIDTH, 8)
    losses: list[Tensor] = []
    output = schedule.step(*([x] if rank == 0 else []), **({"target": y, "losses": losses} if rank == 1 else {}))
    expected, outputs = [], []
    for piece, target in zip(x.tensor_split(MICROBATCHES, 1), y.tensor_split(MICROBATCHES, 1), strict=True):
        outputs.append(plain(piece))
        expected.append(_mse(outputs[-1], target))
        (expected[-1] / MICROBATCHES).backward()
    found = reference.differences("gradient", [p.grad for p in stages[0].submod.parameters()],
                                  [p.grad for p in plain[rank].parameters()], exact=False)  # fmt: skip
    if rank == 1:
        found += reference.differences("output", output, torch.cat(outputs, 1).detach(), exact=False)
        found += reference.differences("losses", losses, [loss.detach() for loss in expected], exact=False)
    return found


@api.ours_only("targets are cut along dimension 0")
def test_the_batch_may_be_another_dimension_throughout() -> None:
    assert ranks.run(_train_by_columns, 2) == [[], []]


class Shifted(nn.Module):
    """Adds what it is given by keyword."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return 2 * x + shift


def _broadcast_keyword(rank: int, rows: int) -> Any:
    schedule = make_schedule("GPipe", make_stages({rank: Shifted()}, 2), MICROBATCHES, None)
    x, shift = torch.randn(rows, WIDTH), torch.randn(1, WIDTH)
    try:
        output = schedule.step(*([x] if rank == 0 else []), shift=shift)
    except (RuntimeError, ValueError) as error:
        return "the input has a batch of 1" in str(error)
    return torch.equal(output, 2 * (2 * x + shift) + shift) if rank == 1 else True


@api.ours_only("refuses a keyword input of one row")
@pytest.mark.parametrize("rows", [6, 1])
def test_a_keyword_input_of_one_row_holds_for_every_microbatch_of_a_larger_batch_only(rows: int) -> None:
    assert ranks.run(_broadcast_keyword, 2, rows=rows) == [True, True]


def test_chunk_and_merge_specifications() -> None:
    assert ranks.run(_split_by_columns, 2) == [[], []]


def _tell_the_loss(rank: int) -> list[float]:
    def weighted(output: Tensor, target: Tensor, *, scale: float) -> Tensor:
        return _mse(output, target) * scale

    torch.manual_seed(rank)
    stages = make_stages({rank: nn.Linear(WIDTH, WIDTH)}, 2)
    schedule = make_schedule("1F1B", stages, MICROBATCHES, weighted)
    x, target = torch.ones(6, WIDTH), torch.zeros(6, WIDTH)
    results = []
    for scale in (1.0, 2.0):
        losses: list[Tensor] = []
        # torch's hidden backward calls the loss on every rank's behalf, so all are told.
        options = {"loss_kwargs": {"scale": scale}}
        if rank == 0:
            schedule.step(x, **options)
        else:
            schedule.step(target=target, losses=losses, **options)
            results.append(torch.stack(losses).sum().item())
    return results


def test_the_loss_gets_its_keywords() -> None:
    _, (once, twice) = ranks.run(_tell_the_loss, 2)
    assert twice == pytest.approx(2 * once)


class Nested(nn.Module):
    """Takes a dict of a tensor and a pair, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: dict[str, Any], power: int) -> Tensor:
        left, right = inputs["pair"]
        return self.linear(inputs["x"] * left + right) ** power


def _take_nested(rank: int) -> list[str]:
    torch.manual_seed(3)
    plain = [Nested(), nn.Linear(WIDTH, WIDTH)]
    stages = make_stages({rank: plain[rank]}, 2)
    schedule = make_schedule("GPipe", stages, MICROBATCHES, None)
    inputs = {"x": torch.randn(6, WIDTH), "pair": (torch.randn(6, 1), torch.randn(6, WIDTH))}
    with torch.no_grad():
        output = schedule.step(*([inputs, 2] if rank == 0 else []))
        expected = plain[1](plain[0](inputs, 2))
    return reference.differences("output", output, expected, exact=False) if rank == 1 else []


def test_nested_inputs_are_split_leaf_by_leaf() -> None:
    assert ranks.run(_take_nested, 2) == [[], []]


def _reuse_the_list(rank: int) -> tuple[int, bool]:
    twins = Twins(rank, Setting("1F1B", MICROBATCHES))
    losses: list[Tensor] = [torch.zeros(())] * 7
    batch = twins.example.batch(6, 0)
    for _ in range(2):
        options = {"target": batch.target, "losses": losses} if rank == 1 else {}
        twins.schedule.step(*(batch.args if rank == 0 else ()), **options)
    return len(losses), any(loss.grad_fn is not None for loss in losses)


@api.ours_only("losses keep their graph")
def test_the_list_of_losses_is_emptied_first_and_holds_no_graph() -> None:
    assert ranks.run(_reuse_the_list, 2)[1] == (MICROBATCHES, False)
