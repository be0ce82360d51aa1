"""Charts of the report page: scales at round numbers, values where they belong, nothing for nothing."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from pp_runtime.pictures.charts import line_chart, share_chart, ticks
from tests.helpers import api

pytestmark = api.ours_only("draws no charts")


def plain(value: float) -> str:
    return f"{value:.4g}"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(1, 8))
def test_scales_hold_their_values_at_few_round_numbers(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step and found[-1] >= low + width - 1e-6 * step
    assert len(found) <= most + 3
    digit = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digit - each) for each in (1, 2, 5, 10)) < 1e-3 * digit + 1e-6 * max(1, abs(low)) / step


def test_scales_of_one_value() -> None:
    assert ticks(0.0, 0.0, 4)[-1] > 0
    assert ticks(5.0, 5.0, 4)[0] <= 5.0 <= ticks(5.0, 5.0, 4)[-1]


def points_of(chart: str) -> list[tuple[float, float]]:
    line = re.search(r'<polyline class="line" points="([^"]*)"', chart)
    assert line is not None
    return [tuple(map(float, point.split(","))) for point in line[1].split()]  # type: ignore[misc]


def test_a_line_goes_through_the_known_values() -> None:
    chart = line_chart("loss", [1, 2, 3, 4], [4.0, None, 2.0, 1.0], plain, from_zero=False)
    ET.fromstring(chart)
    points = points_of(chart)
    assert len(points) == 3 and points[0][1] < points[1][1] < points[2][1]  # y grows downwards
    assert abs((points[1][0] - points[0][0]) - 2 * (points[2][0] - points[1][0])) < 0.3
    assert "<title>step 3: 2</title>" in chart and 'aria-label="loss: 1 at step 4, from 1 to 4"' in chart


def test_a_first_step_that_compiles_does_not_flatten_the_others() -> None:
    values = [50.0] + [1.0 + 0.01 * (number % 3) for number in range(20)]
    chart = line_chart("time", list(range(1, 22)), values, plain, from_zero=True)
    assert "1 beyond the scale, at most 50, step 1" in chart
    heights = [y for _, y in points_of(chart)]
    assert min(heights) == heights[0] and max(heights) < 120  # of 190: the others use half of the height


def test_many_steps_are_shown_together_under_the_pointer() -> None:
    chart = line_chart("x", list(range(1000)), [float(step) for step in range(1000)], plain, from_zero=True)
    assert len(points_of(chart)) == 1000
    assert chart.count("<title>") == 250 and "step 0 to 3: mean 1.5" in chart


def test_nothing_known_is_no_chart_and_one_value_is_a_dot() -> None:
    assert line_chart("x", [1, 2], [None, None], plain, from_zero=True) == ""
    assert "<circle" in line_chart("x", [1, 2], [None, 3.0], plain, from_zero=False)


def test_words_are_escaped() -> None:
    ET.fromstring(line_chart('<loss> & "more"', [1, 2], [1.0, 2.0], lambda value: f"<{value}>", from_zero=True))


def test_shares_stack_to_their_sum() -> None:
    chart = share_chart("shares", {"one": ("#111111", [0.5, 0.25]), "two": ("#222222", [0.25, 0.75])})
    root = ET.fromstring(chart)
    columns = root.findall("g")
    assert [column.findtext("title") for column in columns] == [
        "rank 0: one 50.0%, two 25.0%",
        "rank 1: one 25.0%, two 75.0%",
    ]
    heights = [[float(rect.attrib["height"]) for rect in column.findall("rect")] for column in columns]
    assert abs(heights[0][0] - 2 * heights[0][1]) < 0.3
    assert abs(sum(heights[1]) - 4 * heights[1][0]) < 0.5
    many = ET.fromstring(share_chart("shares", {"one": ("#111111", [0.5] * 64)}))
    names = [text for text in many.iter("text") if (text.text or "").isdigit()]
    assert 8 <= len(names) <= 20
