"""One process of a large topology, on torch's fake process group; and stores that cannot be cloned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from pp_runtime.running.agreement.agreement import _own_connection
from pp_runtime.timing.simulation import simulate
from tests.helpers import api, reference
from tests.helpers.models import WIDTH, rows_of_floats
from tests.helpers.pipelines import make_schedule, make_stages, step

pytestmark = api.ours_only("knows no dry runs")

_mse = nn.functional.mse_loss


@pytest.fixture
def many_ranks() -> Iterator[None]:
    """This process is rank 3 of 64, the others of which do not exist."""
    dist.init_process_group("fake", rank=3, world_size=64, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "per_rank"), [("1F1B", 1), ("Interleaved1F1B", 2)])
def test_absent_ranks_are_planned_for_and_not_waited_for(many_ranks: None, name: str, per_rank: int) -> None:
    stages = make_stages({3 + 64 * number: nn.Linear(WIDTH, WIDTH) for number in range(per_rank)}, 64 * per_rank)
    schedule = make_schedule(name, stages, 128, _mse)
    rows = schedule.memory_report(torch.empty(4, WIDTH, device="meta")).ranks
    assert len(rows) == 64 and rows[3].activations.count > 0
    order, _ = schedule._order_to_run()
    assert simulate(order).makespan > 0
    before = time.monotonic()
    for call in (schedule.step, schedule.eval):
        with pytest.raises(RuntimeError, match=r"rank 3 cannot .*other 63 of .*do not exist.*memory_report"):
            call()
    assert time.monotonic() - before < 5
    with pytest.raises(ValueError, match="n_microbatches"):
        make_schedule(name, stages, 0, _mse)


def test_a_pipeline_of_one_rank_runs_among_absent_ranks(many_ranks: None) -> None:
    mesh = dist.init_device_mesh("cpu", (64, 1), mesh_dim_names=("data", "pipeline"))
    stages = make_stages({index: nn.Linear(WIDTH, WIDTH) for index in range(2)}, 2, mesh["pipeline"].get_group())
    schedule = make_schedule("Interleaved1F1B", stages, 4, _mse)
    _is_the_plain_models(schedule, stages)


class Uncloned(dist.Store):
    """A store written in Python, of which c10d's own ``clone`` and ``check`` know nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dist.HashStore()

    def set(self, key: Any, value: Any) -> None:
        self.inner.set(key, value)

    def get(self, key: Any) -> Any:
        return self.inner.get(key)

    def wait(self, keys: Any, *timeout: Any) -> None:
        self.inner.wait(keys, *timeout)


def test_a_pipeline_of_one_rank_needs_nothing_of_its_store() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=Uncloned())
    try:
        stages = make_stages({0: nn.Linear(WIDTH, WIDTH)}, 1)
        _is_the_plain_models(make_schedule("GPipe", stages, 4, _mse), stages)
    finally:
        dist.destroy_process_group()


class Checked(Uncloned):
    def check(self, keys: Any) -> bool:
        return self.inner.check(keys)


def test_a_store_that_cannot_be_cloned_is_shared_where_it_can_be_used() -> None:
    store = Checked()
    assert _own_connection(store) is store
    with pytest.raises(ValueError, match="neither be cloned nor asked for a key"):
        _own_connection(Uncloned())


def _is_the_plain_models(schedule: Any, stages: list[Any]) -> None:
    batch = rows_of_floats(8, 0)
    got = step(schedule, stages, batch)
    gradients = [parameter.grad for stage in stages for parameter in stage.submod.parameters()]
    modules = [stage.submod for stage in stages]
    for module in modules:
        module.zero_grad()
    expected = reference.train_step(modules, batch, _mse, schedule._n_microbatches)
    assert not reference.differences("output", got.outputs, expected.outputs)
    for parameter, gradient in zip(nn.ModuleList(modules).parameters(), gradients, strict=True):
        assert not reference.differences("gradient", gradient, parameter.grad, exact=False)
