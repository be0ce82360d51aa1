"""Layers to stages: no contiguous partition has a smaller largest load, whatever parts are worth and must hold."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pp_runtime import Partition, partition
from pp_runtime.errors import PipelineUsageError
from tests.helpers import api

pytestmark = api.ours_only("partitions nothing")


@dataclass
class Drawn:
    costs: list[float]
    parts: int
    extra: dict[int, float]
    worth: list[float]
    begins: list[int]
    least: int


@st.composite
def problems(draw: st.DrawFn) -> Drawn:
    costs = draw(st.lists(st.integers(0, 36).map(lambda number: number / 4), min_size=1, max_size=9))
    least = draw(st.integers(0, 2))
    parts = draw(st.integers(1, 5))
    assume(parts * least <= len(costs))
    return Drawn(
        costs,
        parts,
        draw(st.dictionaries(st.integers(-parts, parts - 1), st.integers(0, 9), max_size=2)),  # type: ignore[arg-type]
        draw(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=parts, max_size=parts)),
        draw(st.lists(st.integers(0, len(costs) - 1), max_size=2)),
        least,
    )


def all_partitions(drawn: Drawn) -> Iterator[list[int]]:
    count = len(drawn.costs)
    for inner in itertools.combinations_with_replacement(range(count + 1), drawn.parts - 1):
        ends = [0, *inner, count]
        sizes = [end - begin for begin, end in itertools.pairwise(ends)]
        if min(sizes) >= drawn.least and all(layer in ends for layer in drawn.begins):
            yield sizes


def loads_of(drawn: Drawn, sizes: Sequence[int]) -> list[float]:
    loads, begin = [], 0
    for part, size in enumerate(sizes):
        extra = drawn.extra.get(part, 0) + drawn.extra.get(part - drawn.parts, 0)
        loads.append((sum(drawn.costs[begin : begin + size]) + extra) / drawn.worth[part])
        begin += size
    return loads


@given(problems())
def test_no_partition_has_a_smaller_largest_load_and_none_of_those_is_more_even(drawn: Drawn) -> None:
    every = list(all_partitions(drawn))
    arguments = {"extra": drawn.extra, "worth": drawn.worth, "begins": drawn.begins, "least": drawn.least}
    if not every:
        with pytest.raises(PipelineUsageError, match="take more stages"):
            partition(drawn.costs, drawn.parts, **arguments)  # type: ignore[arg-type]
        return
    made = partition(drawn.costs, drawn.parts, **arguments)  # type: ignore[arg-type]
    assert list(made) in every
    assert list(made.loads) == loads_of(drawn, made)
    least = min(max(loads_of(drawn, sizes)) for sizes in every)
    assert max(made.loads) == least
    loads = [loads_of(drawn, sizes) for sizes in every]
    squares = [sum(load * load for load in each) for each in loads if max(each) == least]
    assert sum(load * load for load in made.loads) == min(squares)


def test_equal_layers_are_spread_evenly_with_the_lighter_stages_first() -> None:
    assert partition([1] * 10, 4) == (2, 2, 3, 3)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    made = partition([1.0] * 16, 4, extra={0: 0.5, -1: 3.0})
    assert made == (4, 5, 5, 2) and made.loads == (4.5, 5.0, 5.0, 5.0)
    assert made.balance == pytest.approx(19.5 / 4 / 5)
    assert made.ranges[0].start == 0 and made.ranges[-1].stop == 16


def test_a_layer_that_must_begin_a_stage_does() -> None:
    assert partition([1] * 8, 2, begins=[7]) == (7, 1)


def test_large_models_take_no_time() -> None:
    costs = [1.0 + layer % 7 for layer in range(400)]
    made = partition(costs, 64, extra={-1: 40.0})
    assert sum(made) == 400 and len(made) == 64


def test_ranks_can_send_one_another_their_partition() -> None:
    made = partition([1.0, 2.0, 3.0], 2, extra={0: 0.5})
    sent = pickle.loads(pickle.dumps(made))
    assert sent == made and sent.loads == made.loads and copy.deepcopy(made).balance == made.balance


def test_the_bubble_that_remains_is_simulated() -> None:
    even, uneven = partition([1.0] * 8, 4), partition([1.0] * 8, 4, begins=[5])
    assert even.simulate("1F1B", 4, 8).bubble == pytest.approx(3 / 11)
    assert uneven.simulate("1F1B", 4, 8).bubble > even.simulate("1F1B", 4, 8).bubble
    assert str(even) == "Partition(2, 2, 2, 2; balance 1.000)"
    assert isinstance(even, Partition)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0] * 3, 4), "3 layers do not make 4 parts of at least 1"),
        (([1.0, -1.0], 2), "costs are numbers of at least 0, and number 1 is -1.0"),
        (([1.0, float("nan")], 2), "number 1 is nan"),
        (([1.0] * 4, 2, {2: 1.0}), "extra names part 2, and there are 2"),
        (([1.0] * 4, 2, None, [1.0]), "worth needs a number above 0 for each of 2 parts"),
        (([1.0] * 4, 2, None, None, [4]), "begins names layer 4, and there are 4"),
        (([1.0] * 4, 2, None, None, [1, 2]), "take more stages"),
    ],
)
def test_what_cannot_be_cut_is_said(arguments: tuple, words: str) -> None:
    names = ("costs", "parts", "extra", "worth", "begins")
    with pytest.raises(PipelineUsageError, match=words):
        partition(**dict(zip(names, arguments, strict=False)))
