"""Modules of the model are modules of a traced stage, so that hooks and wrappers go around them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from pp_runtime.splitting.tracing import SplitPoint, pipeline


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        self.self = nn.Tanh()
        self.register_buffer("offset", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            gate = gate * self.offset
        hidden = self.linear(self.self(self.norm(x)) * 2)
        return x + hidden * gate, hidden


class Blocks(nn.Module):
    """Blocks of which the last is called twice, with a product by the weight of one that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.borrows = nn.Linear(4, 4)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        for block in [*self.blocks, self.blocks[3]]:
            x, hidden = block(x, gate)
            gate = gate + hidden.tanh()
        return self.borrows(x) @ self.borrows.weight


X, GATE = torch.randn(2, 4), torch.randn(2, 4)


def stages_of(model: nn.Module) -> tuple[Any, list[Any]]:
    pipe = pipeline(model, (X, GATE), split_spec={"blocks.2": SplitPoint.BEGINNING})
    return pipe, [pipe.get_stage_module(index) for index in range(2)]


def graph_modules(stage: nn.Module) -> set[str]:
    return {name for name, part in stage.named_modules() if isinstance(part, fx.GraphModule) and "submod" not in name}


def test_modules_in_one_piece_are_called_and_others_are_part_of_what_is_around_them() -> None:
    _, (first, second) = stages_of(Blocks())
    parts = ["", ".norm", ".self", ".linear"]
    assert graph_modules(first) == {"", *(f"blocks.{block}{part}" for block in (0, 1) for part in parts)}
    assert graph_modules(second) == {"", *(f"blocks.2{part}" for part in parts)}
    assert set(dict(second.named_parameters())) == {
        *(f"blocks.{block}.{name}" for block in (2, 3) for name in dict(Block().named_parameters())),
        *(f"borrows.{name}" for name in ("weight", "bias")),
    }
    assert all("offset" not in name for stage in (first, second) for name in stage.state_dict())
    assert all("offset" not in name for name in copy.deepcopy(first).state_dict())
    assert len(list(copy.deepcopy(first).buffers())) == 2


def test_hooks_and_wrappers_of_inner_modules_see_what_those_of_the_model_see() -> None:
    model = Blocks()
    pipe, (first, _) = stages_of(copy.deepcopy(model))
    seen: list[list[Tensor]] = [[], []]
    for found, blocks in zip(seen, (model.blocks, first.blocks), strict=True):
        getattr(blocks, "1").linear.register_forward_hook(
            lambda _, args, output, found=found: found.extend([*args, output])
        )
    first.blocks.add_module("0", checkpoint_wrapper(getattr(first.blocks, "0"), CheckpointImpl.NO_REENTRANT))
    (output,), expected = pipe(X, GATE), model(X, GATE)
    assert torch.equal(output, expected)
    assert len(seen[0]) == 2 and all(map(torch.equal, *seen))
    output.sum().backward()
    expected.sum().backward()
    gradients = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for stage in pipe.split_gm.children()
        for name, parameter in stage.named_parameters()
    }
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)
