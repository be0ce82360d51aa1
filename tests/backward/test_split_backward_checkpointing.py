"""A checkpointed block runs forward twice, whichever kind the checkpoint is: the halves share what was run again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from pp_runtime._backward import stage_backward_input, stage_backward_weight
from tests.helpers.backward_halves import assert_same, split, whole


def keep_products(context, operation, *args, **kwargs):
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


KINDS = {
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "to the end": partial(checkpoint, use_reentrant=False, early_stop=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep_products)
    ),
    "reentrant": partial(checkpoint, use_reentrant=True),
}


class Block(nn.Module):
    def __init__(self, parametrized: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        if parametrized:
            parametrizations.weight_norm(self.up)
        self.dropout = nn.Dropout(0.3)
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return x + self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Checkpointed(nn.Module):
    def __init__(self, kind: str, depth: int = 3, parametrized: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(parametrized) for _ in range(depth))
        self.checkpoint = KINDS[kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        for block in self.blocks:
            x = self.checkpoint(block, x)
        return x

    def forwards(self) -> list[int]:
        counts = [block.forwards for block in self.blocks]
        for block in self.blocks:
            block.forwards = 0
        return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parametrized", [False, True])
def test_a_block_runs_forward_twice(kind: str, parametrized: bool) -> None:
    model = Checkpointed(kind, parametrized=parametrized)
    inputs = [torch.randn(4, 8, requires_grad=True)]
    expected = whole(model, inputs)
    assert model.forwards() == [2, 2, 2]
    found = split(model, inputs)
    assert model.forwards() == [2, 2, 2]
    assert_same(expected, found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_half_runs_no_forward(kind: str) -> None:
    model = Checkpointed(kind)
    x = torch.randn(4, 8, requires_grad=True)
    groups = stage_backward_input([model(x)], None, [x], model.parameters())[1]
    assert model.forwards() == [2, 2, 2]
    assert all(weight.grad is None for weight in model.parameters())
    stage_backward_weight(model.parameters(), groups)
    assert model.forwards() == [0, 0, 0]
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_a_checkpoint_within_a_checkpoint(kind: str) -> None:
    class Nested(Checkpointed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.checkpoint(super().forward, x)

    model = Nested(kind)
    inputs = [torch.randn(4, 8, requires_grad=True)]
    expected = whole(model, inputs)
    counts = model.forwards()
    assert_same(expected, split(model, inputs))
    assert model.forwards() == counts


def test_checkpointed_segments_of_a_first_stage() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4))).eval()

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.blocks = nn.Embedding(9, 8), model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential(self.blocks, 2, self.table(tokens), use_reentrant=False)

    stage = Segments()
    tokens = [torch.randint(9, (3, 5))]
    assert_same(whole(stage, tokens), split(stage, tokens))
    assert [block.forwards for block in model] == [4, 4, 2, 2]  # torch checkpoints all segments but the last


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_weight_shared_by_checkpointed_blocks(kind: str) -> None:
    model = Checkpointed(kind).double().eval()
    for block in model.blocks[1:]:
        block.up.weight = model.blocks[0].up.weight
    inputs = [torch.randn(4, 8, dtype=torch.float64, requires_grad=True)]
    assert_same(whole(model, inputs), split(model, inputs), exact=False)
