"""Data-parallel adapters, on a group of one rank: what gathers, what reduces, and when."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pp_runtime.running.data_parallel import ReplicatedAdapter, ShardedAdapter, Wrapped
from pp_runtime.running.gradients.step_gradients import scale_gradients


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def count_reductions(module: DistributedDataParallel) -> list[int]:
    counted: list[int] = []

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counted.append(bucket.index())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    module.register_comm_hook(None, hook)
    return counted


def train(adapter: Any, module: nn.Module, microbatches: list[torch.Tensor]) -> None:
    """A step as the runtime makes it: all forwards, then all backwards."""
    adapter.unshard()
    outputs = []
    for x in microbatches:
        with adapter.forward_context():
            outputs.append(module(x).square().sum())
    for index, output in enumerate(outputs):
        last = index == len(outputs) - 1
        adapter.before_backward(last)
        output.backward()
        adapter.after_backward(last)
    adapter.reduce_grad()
    adapter.reshard()


def expected_gradients(microbatches: list[torch.Tensor]) -> list[torch.Tensor]:
    plain = model()
    for x in microbatches:
        plain(x).square().sum().backward()
    return [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]


def test_plain_module_needs_no_adapter() -> None:
    assert Wrapped.of([model()]).adapter() is None


def test_ddp_reduces_once_in_the_last_backward(group_of_one: None) -> None:
    module = DistributedDataParallel(model())
    counted = count_reductions(module)
    adapter = Wrapped.of([nn.Sequential(module)]).adapter()
    assert isinstance(adapter, ReplicatedAdapter)
    microbatches = list(torch.randn(3, 2, 4))
    for _ in range(2):
        counted.clear()
        module.zero_grad()
        train(adapter, module, microbatches)
        assert counted == [0]
        got = [parameter.grad for parameter in module.parameters()]
        torch.testing.assert_close(got, expected_gradients(microbatches))


@pytest.mark.parametrize("nested", [False, True])
def test_fully_sharded_gathers_and_reduces_where_told(group_of_one: None, nested: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    module = model()
    if nested:
        fully_shard(module[0], mesh=mesh)
        fully_shard(module[2], mesh=mesh)
    else:
        fully_shard(module, mesh=mesh)
    adapter = Wrapped.of([module]).adapter()
    assert isinstance(adapter, ShardedAdapter)
    microbatches = list(torch.randn(3, 2, 4))
    for _ in range(2):
        module.zero_grad()
        train(adapter, module, microbatches)
        got = [parameter.grad.full_tensor() for parameter in module.parameters()]
        torch.testing.assert_close(got, expected_gradients(microbatches))
        assert all(type(parameter).__name__ == "DTensor" for parameter in module.parameters())


def test_scaling_divides_every_gradient_once() -> None:
    module = model()
    module(torch.randn(2, 4)).sum().backward()
    module[2].bias.grad = None
    before = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    scale_gradients(module.parameters(), 1)
    scale_gradients(module.parameters(), 4)
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert (parameter.grad is None) == (old is None)
        assert old is None or torch.equal(parameter.grad, old / 4)
