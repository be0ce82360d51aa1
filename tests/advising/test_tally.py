"""What a tally counts: memory that operators make and drop, and what a device would take for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pp_runtime import DeviceSpeed
from pp_runtime.advising.tally import Tally, tallied
from pp_runtime.errors import PipelineUsageError
from tests.helpers import api

pytestmark = api.ours_only("tallies nothing")
KIB = 1024


def test_memory_is_counted_from_when_an_operator_makes_it_to_when_it_is_dropped() -> None:
    given = torch.zeros(256)
    with Tally() as tally:
        one = given + 1
        two = one * 2
        view = two[1:].view(-1)
        one.add_(1)
    assert (tally.live, tally.most) == (2 * KIB, 2 * KIB)
    del one
    assert tally.live == KIB
    del two
    assert tally.live == KIB and view.sum() == 255 * 2  # the view holds it
    del view
    assert (tally.live, tally.most) == (0, 2 * KIB)
    assert tally.mark() == 0 == tally.most


def test_the_graph_holds_what_its_backward_needs_and_the_backward_frees_it() -> None:
    weight = nn.Parameter(torch.ones(256))
    given = torch.ones(256)
    with Tally() as tally:
        output = (given * weight).exp().sum()  # exp keeps its result, sum nothing
        assert tally.live == KIB + 4
        output.backward()
        assert tally.most <= 3 * KIB + 8
        del output
    assert tally.live == KIB  # the gradient
    assert weight.grad is not None


def test_memory_of_tensors_is_counted_once_and_only_what_was_made() -> None:
    before = torch.zeros(256)
    with Tally() as tally:
        made = before + 1
    assert tally.size_of(tally.memory_of([made, made[3:], before])) == KIB


def test_an_operator_takes_as_long_as_its_work_or_its_bytes() -> None:
    a, b = (torch.empty(64, 64, device="meta") for _ in range(2))
    flops, moved = 2 * 64**3, 3 * 64 * 64 * 4
    for device, seconds in ((DeviceSpeed(1e3), flops / 1e3), (DeviceSpeed(1e9, 1e2), moved / 1e2)):
        with Tally(device) as tally:
            a @ b
            a.view(-1).detach()
        assert tally.seconds == pytest.approx(seconds)
    with Tally(DeviceSpeed(1e3)) as tally:
        a + b  # has no products
    assert tally.seconds == 0


def test_attention_on_meta_is_fused() -> None:
    query, key, value = (torch.empty(2, 4, 512, 16, device="meta", requires_grad=True) for _ in range(3))
    scores = 2 * 4 * 512 * 512
    tally = Tally(DeviceSpeed(1.0))
    with tallied(tally):
        output = scaled_dot_product_attention(query, key, value, is_causal=True)
        assert tally.live == output.numel() * 4 + 2 * 4 * 512 * 4  # and the sums of its rows
        assert tally.seconds == 2 * (2 * scores * 16)
        output.backward(torch.empty_like(output))
    assert tally.seconds == (2 + 5) * (2 * scores * 16)
    assert tally.most < scores * 4
    assert value.grad is not None and value.grad.shape == value.shape


def test_attention_elsewhere_is_what_it_is() -> None:
    parts = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    with tallied(Tally()):
        found = scaled_dot_product_attention(*parts)
    torch.testing.assert_close(found, scaled_dot_product_attention(*parts))


def test_grouped_queries_keep_their_shape() -> None:
    query, key = torch.empty(1, 8, 6, 4, device="meta"), torch.empty(1, 2, 6, 4, device="meta")
    with tallied(Tally()):
        found: Tensor = scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert found.shape == query.shape


@pytest.mark.parametrize(("flops", "moved"), [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_a_device_that_does_nothing_is_refused(flops: float, moved: float) -> None:
    with pytest.raises(PipelineUsageError, match="more than 0"):
        DeviceSpeed(flops, moved)
