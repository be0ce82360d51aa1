"""Losses that train: one that is a module, one that runs the model's head itself; and leaves among the inputs."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import api, ranks, reference
from tests.helpers.pipelines import EVERY_SCHEDULE, held_by, make_schedule, make_stages, stages_allowed

pytestmark = api.ours_only("leaves such gradients undivided, or without what the loss's own backward freed")

MICROBATCHES, ROWS, WIDTH, CHUNKS = 4, 8, 6, 2
WARM = "torch.distributed.fsdp"


class HeadedLoss(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.head(output), target)


class Last(nn.Module):
    """A stage that ends in a norm, with a head that only the loss runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.layer(x)))


class _Hidden(torch.autograd.Function):
    """Gives the gradient that the chunks made."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.saved_tensors[0] * outer, None, None


def chunked_loss(head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """The head and the loss a chunk at a time, each with a backward of its own: what torchtitan's chunked loss does."""
    sharded = hasattr(head, "set_reshard_after_backward")
    chunks = [chunk.detach().requires_grad_() for chunk in hidden.chunk(CHUNKS)]
    if sharded:
        head.set_reshard_after_forward(False)
        head.set_reshard_after_backward(False)
        head.set_requires_gradient_sync(False, recurse=False)
    total = torch.zeros(())
    for place, (chunk, wanted) in enumerate(zip(chunks, target.chunk(CHUNKS), strict=True)):
        if sharded and place == CHUNKS - 1:
            head.set_requires_gradient_sync(True, recurse=False)
        loss = F.mse_loss(head(chunk), wanted) / CHUNKS
        loss.backward()
        total += loss.detach()
    if sharded:
        head.set_reshard_after_forward(True)
        head.set_reshard_after_backward(True)
        head.set_requires_gradient_sync(True, recurse=False)
        head.reshard()
    return _Hidden.apply(hidden, torch.cat([chunk.grad for chunk in chunks]), total)


def _batch(seed: int) -> reference.Batch:
    generator = torch.Generator().manual_seed(seed)
    return reference.Batch(
        (torch.randn(ROWS, WIDTH, generator=generator),), torch.randn(ROWS, WIDTH, generator=generator)
    )


def _differences(name: str, module: nn.Module, plain: nn.Module, divisor: int = 1) -> list[str]:
    found = []
    for (key, parameter), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        got = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        wanted = None if expected.grad is None else expected.grad / divisor
        found += reference.differences(f"{name} {key}", got, wanted, exact=False)
    return found


def _train_chunked(rank: int, schedule: str, sharded: bool) -> list[str]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    place, replica = mesh.get_coordinate()
    per_rank = stages_allowed(schedule, 2)[-1]
    torch.manual_seed(2)
    plain = [nn.Linear(WIDTH, WIDTH) for _ in range(2 * per_rank - 1)] + [Last()]
    modules = {index: copy.deepcopy(plain[index]) for index in held_by(place, schedule, 2, per_rank)}
    stages = make_stages(modules, len(plain), mesh["pipeline"].get_group())
    last = modules.get(len(plain) - 1)
    pipeline = make_schedule(schedule, stages, MICROBATCHES, partial(chunked_loss, last.head) if last else F.mse_loss)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for module in modules.values():
            if module is last:
                fully_shard(module.layer, mesh=mesh["data"])
                fully_shard([module.norm, module.head], mesh=mesh["data"])
            fully_shard(module, mesh=mesh["data"])
    found = []
    for step in range(2):
        for module in (*modules.values(), *plain):
            module.zero_grad()
        batches = [_batch(10 * step + (data if sharded else replica)) for data in range(2 if sharded else 1)]
        for batch in batches:
            for x, y in zip(batch.args[0].chunk(MICROBATCHES), batch.target.chunk(MICROBATCHES), strict=True):
                for module in plain:
                    x = module(x)
                (sum(F.mse_loss(plain[-1].head(a), b) / CHUNKS for a, b in zip(x.chunk(2), y.chunk(2), strict=True))
                 / (MICROBATCHES * len(batches))).backward()  # fmt: skip
        own = _batch(10 * step + replica)
        pipeline.step(*(own.args if 0 in modules else ()), **({"target": own.target} if last else {}))
        for index, module in modules.items():
            found += _differences(f"{schedule}: step {step}, stage {index}", module, plain[index])
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "fully_shard"])
def test_a_loss_that_runs_the_head_a_chunk_at_a_time(sharded: bool) -> None:
    for schedule in EVERY_SCHEDULE:
        assert ranks.run(_train_chunked, 4, schedule=schedule, sharded=sharded) == [[]] * 4


def _plain_gradients(modules: list[nn.Module], batch: reference.Batch, loss_fn: Any, leaves: list[Tensor]) -> None:
    """Adds to the gradients of modules and leaves the mean over the microbatches."""
    pieces = zip(batch.args[0].chunk(MICROBATCHES), batch.target.chunk(MICROBATCHES), strict=True)
    for x, y in pieces:
        for module in modules:
            x = module(x) + sum(leaves, torch.zeros(()))
        (loss_fn(x, y) / MICROBATCHES).backward()


class _Prompted(nn.Module):
    """Adds what it is given by name; its parameters are nobody's children."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        x = self.layer(x)
        return x if prompt is None else x + prompt


def _closure(loss: nn.Module) -> Any:
    return lambda output, target: loss(output, target)


def _train_losses(rank: int, schedules: list[str], kind: str) -> list[str]:
    """Two steps without zeroing between them, so that a division too many or too few shows."""
    found = []
    for name in schedules:
        per_rank = stages_allowed(name, 2)[-1]
        torch.manual_seed(3)
        plain: list[nn.Module] = [_Prompted() for _ in range(2 * per_rank)]
        plain_loss, plain_prompt = HeadedLoss(), torch.randn(WIDTH, requires_grad=True)
        modules = {index: copy.deepcopy(plain[index]) for index in held_by(rank, name, 2, per_rank)}
        headed, prompt = copy.deepcopy(plain_loss), plain_prompt.detach().clone().requires_grad_()
        loss_fn: Any = {
            "module": headed,
            "method": headed.forward,
            "partial": partial(headed),
            "closure": _closure(headed),
        }[kind]
        stages = make_stages(modules, len(plain), None)
        schedule = make_schedule(name, stages, MICROBATCHES, loss_fn)
        for step in range(2):
            batch = _batch(step)
            _plain_gradients(plain, batch, plain_loss, [plain_prompt])
            args = batch.args if 0 in modules else ()
            target = batch.target if len(plain) - 1 in modules else None
            schedule._step_microbatches(
                [(x,) for x in args[0].chunk(MICROBATCHES)] if args else None,
                [{"prompt": prompt} for _ in range(MICROBATCHES)],
                None if target is None else list(target.chunk(MICROBATCHES)),
            )
        for index, module in modules.items():
            found += _differences(f"{name}, stage {index}", module, plain[index])
        if len(plain) - 1 in modules:
            found += _differences(f"{name}, loss", headed, plain_loss)
        prompts = [torch.zeros(WIDTH) for _ in range(2)]
        dist.all_gather(prompts, prompt.grad)
        found += reference.differences(f"{name}, prompt", sum(prompts), plain_prompt.grad, exact=False)
    return found


@pytest.mark.parametrize("kind", ["module", "method", "partial", "closure"])
def test_parameters_of_the_loss_and_leaves_among_the_inputs_are_scaled_once(kind: str) -> None:
    assert ranks.run(_train_losses, 2, schedules=EVERY_SCHEDULE, kind=kind) == [[]] * 2


def _train_replicated_loss(rank: int, schedules: list[str]) -> list[str]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    place, replica = mesh.get_coordinate()
    found = []
    for name in schedules:
        per_rank = stages_allowed(name, 2)[-1]
        torch.manual_seed(3)
        plain: list[nn.Module] = [_Prompted() for _ in range(2 * per_rank)]
        plain_loss = HeadedLoss()
        modules = {index: copy.deepcopy(plain[index]) for index in held_by(place, name, 2, per_rank)}
        group = mesh["data"].get_group()
        headed = nn.parallel.DistributedDataParallel(copy.deepcopy(plain_loss), process_group=group)
        wrapped = {i: nn.parallel.DistributedDataParallel(m, process_group=group) for i, m in modules.items()}
        stages = make_stages(wrapped, len(plain), mesh["pipeline"].get_group())
        schedule = make_schedule(name, stages, MICROBATCHES, headed)
        for data in range(2):
            _plain_gradients(plain, _batch(data), lambda x, y, loss=plain_loss: loss(x, y) / 2, [])
        own = _batch(replica)
        last = len(plain) - 1 in modules
        schedule.step(*(own.args if 0 in modules else ()), **({"target": own.target} if last else {}))
        for index, module in modules.items():
            found += _differences(f"{name}, stage {index}", module, plain[index])
        if last:
            found += _differences(f"{name}, loss", headed, plain_loss)
    return found


def test_a_loss_that_is_wrapped_for_data_parallelism_is_reduced_once() -> None:
    assert ranks.run(_train_replicated_loss, 4, schedules=EVERY_SCHEDULE) == [[]] * 4


def _fail_with_a_prompt(rank: int) -> bool:
    calls = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third one")
        return F.mse_loss(output, target)

    stages = make_stages({rank: _Prompted()}, 2)
    schedule = make_schedule("1F1B", stages, MICROBATCHES, loss_fn)
    prompt, batch = torch.randn(WIDTH, requires_grad=True), _batch(0)
    with pytest.raises(RuntimeError, match="the third one"):
        schedule._step_microbatches(
            [(x,) for x in batch.args[0].chunk(MICROBATCHES)] if rank == 0 else None,
            [{"prompt": prompt} for _ in range(MICROBATCHES)],
            list(batch.target.chunk(MICROBATCHES)) if rank == 1 else None,
        )
    return prompt.grad is None and all(p.grad is None for p in stages[0].submod.parameters())


def test_a_failed_step_leaves_no_gradient_in_a_leaf_among_the_inputs() -> None:
    assert ranks.run(_fail_with_a_prompt, 2) == [True, True]
