"""Split backward under DDP and FSDP2: replicas end with the gradients of the whole batch, reduced once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pp_runtime._backward import stage_backward_input, stage_backward_weight
from pp_runtime.running.data_parallel import Wrapped
from tests.helpers import ranks

MICROBATCHES = 3


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8))


def batch(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 8, generator=generator) for _ in range(MICROBATCHES)]


def wrapped(model: nn.Sequential, kind: str) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(rank: int, kind: str) -> dict[str, Any]:
    """All I first, then all W, as a zero-bubble schedule may order them."""
    model = a_model()
    stage = wrapped(model, kind)
    adapter = Wrapped.of([stage]).adapter()
    assert adapter is not None
    adapter.unshard()
    halves, found = [], []
    for tensor in batch(rank):
        x = tensor.requires_grad_()
        with adapter.forward_context():
            output = stage(x)
        adapter.before_backward(last=False)
        gradients, groups = stage_backward_input([output], None, [x], stage.parameters())
        adapter.after_backward(last=False)
        found.append(gradients[0])
        halves.append(groups)
    reductions = []
    if kind == "ddp":
        stage.register_comm_hook(None, lambda _, bucket: reduced(bucket, reductions))
    for number, groups in enumerate(halves):
        last = number == MICROBATCHES - 1
        assert not reductions
        adapter.before_backward(last)
        stage_backward_weight(stage.parameters(), groups)
        adapter.after_backward(last)
    adapter.reduce_grad()
    full = [w.grad.full_tensor() if hasattr(w.grad, "full_tensor") else w.grad for w in stage.parameters()]
    return {"inputs": [g.detach() for g in found], "weights": [g.detach() for g in full], "reduced": len(reductions)}


def reduced(bucket: Any, reductions: list[int]) -> torch.futures.Future[torch.Tensor]:
    reductions.append(bucket.index())
    tensor = bucket.buffer().div_(2)
    work = torch.distributed.all_reduce(tensor, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_replicas_end_with_the_gradients_of_the_whole_batch(kind: str) -> None:
    results = ranks.run(step, 2, kind=kind)
    model = a_model()
    for rank, result in enumerate(results):
        for tensor, found in zip(batch(rank), result["inputs"], strict=True):
            x = tensor.requires_grad_()
            model(x).sum().backward()
            torch.testing.assert_close(found, x.grad)
    for weight, *replicas in zip(model.parameters(), *(result["weights"] for result in results), strict=True):
        for replica in replicas:
            torch.testing.assert_close(replica, weight.grad / 2)
        assert torch.equal(*replicas)
    if kind == "ddp":
        assert all(result["reduced"] == 1 for result in results)
