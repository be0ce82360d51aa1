"""What units cost by count: what is known by hand, and what their stages hold while they run."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pp_runtime import DeviceSpeed, get_schedule_class, layer_stages, partition, stages_of_rank
from pp_runtime.advising.stage_costs import StageCost, activation_peak, cut_units
from pp_runtime.advising.tally import Tally
from pp_runtime.advising.unit_row import Sample, UnitRow
from pp_runtime.advising.units import Unit, count_units, measure_units
from pp_runtime.orders import build_order
from tests.helpers import api, ranks

pytestmark = api.ours_only("counts no units")
WIDTH, ROWS, WORDS = 32, 50, 50
ONE = ROWS * WIDTH * 4  # bytes of a hidden state


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "checkpointed":
            return checkpoint(self._run, x, use_reentrant=False)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        found = x + self.down(torch.tanh(self.up(self.norm(x))))
        return torch.tanh(found) if self.kind == "keeps output" else found


KINDS = ("plain", "keeps output", "checkpointed")


class Model(nn.Module):
    def __init__(self, kinds: list[str], tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(map(Layer, kinds))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def units_of(
    model: nn.Module, device: DeviceSpeed | None = None, measure: Callable[..., list[Unit]] = count_units
) -> list[Unit]:
    where = next(model.parameters()).device
    tokens = torch.arange(ROWS, device=where)
    sample = Sample((tokens,), {}, tokens)
    row = UnitRow(model, sample, "layers", loss_of)
    return measure(row, sample) if device is None else measure(row, sample, device)


def test_a_layer_is_counted_as_by_hand() -> None:
    unit = units_of(Model(["plain"] * 3))[1]
    statistics = 2 * ROWS * 4  # mean and deviation of the norm
    # The norm's result, the up's and its tanh's, of which the linear layer's own is not kept.
    assert unit.kept == ONE + 2 * ONE + statistics
    assert (unit.keeps_input, unit.keeps_output) == (True, False)  # the norm keeps what it was given
    assert unit.output == unit.gradient == ONE
    assert sum(size for size, _ in unit.parameters.values()) == 4 * (2 * WIDTH + 2 * (2 * WIDTH * WIDTH) + 3 * WIDTH)
    assert unit.needs_input_gradient


def test_the_first_unit_has_the_embedding_and_the_last_the_head_and_the_loss() -> None:
    first, _, last = units_of(Model(["plain"] * 2, tied=True))
    assert not first.needs_input_gradient
    assert first.backward_input == 0 and first.kept_for_weight == first.kept
    assert first.parameters.keys() & last.parameters.keys()  # tied
    assert last.output == 4  # the loss
    assert last.kept >= ROWS * WORDS * 4


def test_outputs_and_checkpoints_are_seen() -> None:
    _, keeps, checkpointed, _, _ = units_of(Model(["plain", "keeps output", "checkpointed", "plain"]))
    assert keeps.keeps_output and not checkpointed.keeps_output
    assert checkpointed.kept < keeps.kept / 10 and checkpointed.keeps_input
    assert checkpointed.backward_most >= keeps.kept  # it runs again


def test_frozen_layers_have_no_backward_for_weights() -> None:
    model = Model(["plain"] * 3)
    model.layers[1].requires_grad_(False)
    frozen = units_of(model, DeviceSpeed(1.0))[1]
    assert sum(trained for _, trained in frozen.parameters.values()) == 0
    assert frozen.backward_weight == 0 < frozen.backward_input
    model.requires_grad_(False)
    assert {unit.backward for unit in units_of(model, DeviceSpeed(1.0))} == {0.0}


def test_on_meta_the_same_is_counted() -> None:
    plain = units_of(Model(["plain", "keeps output", "plain"]), DeviceSpeed(1e9, 1e9))
    meta = units_of(Model(["plain", "keeps output", "plain"]).to("meta"), DeviceSpeed(1e9, 1e9))
    for one, other in zip(plain, meta, strict=True):
        for name in Unit.__slots__:
            if name != "parameters":
                assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0.02), name


def test_a_layer_is_measured_and_split() -> None:
    _, middle, _, _ = units_of(Model(["plain"] * 3), measure=measure_units)
    assert min(middle.forward, middle.backward, middle.backward_input, middle.backward_weight) > 0
    assert middle.kept > 0


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_stage_is_counted_as_its_units_together(kinds: list[str]) -> None:
    """Units of several layers as one, and the stage of units of one layer each."""
    model = Model(["plain", *kinds, "plain"])
    units = units_of(model)[1:-2]
    joined = Model(["plain", "plain", "plain"])
    joined.layers[1] = nn.Sequential(*model.layers[1:-1])  # type: ignore[arg-type]
    whole = units_of(joined)[1]
    stage = StageCost.of(units)
    beyond = stage.output if units[-1].keeps_output else 0
    assert stage.kept - beyond == whole.kept
    assert stage.keeps_input == whole.keeps_input
    found = [(getattr(stage, name), getattr(whole, name)) for name in ("forward_most", "backward_most", "input_most")]
    beyond = stage.output if units[-1].keeps_output_for_weight else 0
    found.append((stage.kept_for_weight - beyond, whole.kept_for_weight))
    assert all(abs(one - other) <= 1.01 * ONE for one, other in found), found  # a gradient here or there


def _peaks(rank: int, schedule: str, seed: int) -> list[str]:
    """What the advice says of a rank's memory, beside what operators hold there during a step."""
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    model = Model([chosen.choice(KINDS) for _ in range(9)])
    mine = stages_of_rank(schedule, rank, 2)
    microbatches, count = 6, 2 * len(mine)
    order, placement = build_order(schedule, 2, count, microbatches)
    sizes = partition([1.0] * 10, count)
    said = activation_peak(order[rank], cut_units(units_of(model), sizes), placement)
    tokens = torch.arange(ROWS * microbatches) % WORDS
    layers = (*sizes[:-1], sizes[-1] - 1)
    stages = layer_stages(model, layers, mine, "cpu", (tokens[:ROWS],), layers="layers")
    kind: Any = get_schedule_class(schedule)
    made = kind(stages if len(mine) > 1 else stages[0], microbatches, loss_fn=loss_of, scale_grads=False)
    for _ in range(3):  # gradients of the steps before are there
        with Tally() as tally:
            made.step(*((tokens,) if rank == 0 else ()), target=tokens, return_outputs=False)
    return [] if abs(said - tally.most) <= 2 * ONE else [f"said {said}, held {tally.most}"]


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZB1P", "ZBVZeroBubble", "InterleavedZeroBubble"])
def test_a_rank_holds_what_was_said(schedule: str) -> None:
    for seed in range(3):
        assert ranks.run(_peaks, schedule=schedule, seed=seed) == [[], []]
