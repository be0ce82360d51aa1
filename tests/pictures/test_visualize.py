"""Pictures of timelines: text, PNG, SVG and HTML."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.pictures.html_page import write_html
from pp_runtime.pictures.palette import LOOKS, stage_places
from pp_runtime.pictures.terminal import text_picture
from pp_runtime.pictures.visualize import draw
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.simulation import simulate
from pp_runtime.timing.timeline import Span, Timeline


def planned(name: str, ranks: int, stages: int, microbatches: int) -> Timeline:
    return simulate(build_order(name, ranks, stages, microbatches)[0]).timeline()


def test_text_shows_ranks_as_rows_and_time_to_the_right() -> None:
    assert text_picture(planned("1F1B", 2, 2, 2)).splitlines() == [
        "rank 0 F0 F1       B0---    B1---",
        "rank 1    F0 B0--- F1 B1---",
        "F forward, B full backward",
    ]


def test_text_of_several_stages_names_them() -> None:
    picture = text_picture(planned("ZBVZeroBubble", 2, 4, 2))
    assert "0F0" in picture and "3I0" in picture and "3W0" in picture


def test_text_is_cut_into_blocks_of_the_width_between_actions() -> None:
    lines = text_picture(planned("ZB1P", 4, 4, 16), width=60).splitlines()
    assert max(map(len, lines[:-1])) <= 60
    assert sum(line.strip().startswith("from ") for line in lines) == len(lines) // 5 > 1
    labels = re.findall(r"[FIW]\d+", "\n".join(lines))
    assert len(labels) == 4 * 3 * 16


def test_coloured_text_has_the_same_labels_and_resets_its_colours() -> None:
    picture = text_picture(planned("1F1B", 2, 2, 3), colour=True)
    assert picture.count("\x1b[48;5;") == picture.count("\x1b[0m")
    assert len(re.findall(r"[FB]\d", re.sub(r"\x1b\[[0-9;]*m", "", picture))) == 12


def test_text_of_measured_times_stays_small_when_one_action_is_tiny() -> None:
    spans = [Span(0, f"0F{place}", place, place + 1.0) for place in range(20)] + [Span(0, "0B0", 20.0, 20.000001)]
    assert max(map(len, text_picture(Timeline(tuple(spans)), width=1000).splitlines())) < 250
    assert text_picture(Timeline(())) == "nothing runs"


def test_a_ranks_stages_have_shades_of_their_own_from_the_first_colour_to_the_last() -> None:
    look = LOOKS["F"]
    assert (look.shade(0.0), look.shade(1.0)) == look.shades
    places = stage_places([planned("Interleaved1F1B", 2, 8, 4)])
    assert [places[stage] for stage in (1, 3, 5, 7)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert len({look.shade(place) for place in places.values()}) == 4


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_planned_and_measured_are_drawn_into_one_picture(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    plan = planned("DualPipeV", 2, 4, 4)
    measured = Timeline(tuple(Span(s.rank, s.action, s.start + 7, s.end + 7.2, 0.1) for s in plan.spans))
    path = tmp_path / f"both.{suffix}"
    draw(path, {"planned": plan, "measured": measured}, title="DualPipeV")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(content) > 5000


def test_timeline_saves_itself_as_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    planned("1F1B", 2, 2, 2).save_png(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"pip install 'pp_runtime\[pictures\]'"):
        draw(tmp_path / "x.png", {"plan": planned("1F1B", 2, 2, 2)})


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(tmp_path / "x.png", {"plan": Timeline(())})


@pytest.mark.parametrize("name", list(ORDERS))
def test_html_page_holds_every_action_and_asks_for_nothing_else(tmp_path: Path, name: str) -> None:
    stages = 4 if ORDERS[name].stages_per_rank_allowed != (1,) else 2
    order, _ = build_order(name, 2, stages, 4)
    write_html(tmp_path / "page.html", {"plan": simulate(order, Costs(transfer=0.1)).timeline()}, title="a < b")
    page = (tmp_path / "page.html").read_text()
    match = re.search(r"const data = (\{.*\}), ROW", page)
    assert match is not None
    data = json.loads(match.group(1))
    assert {bar[6] for bar in data["bars"]} == {str(action) for actions in order.values() for action in actions}
    assert "a &lt; b" in page
    assert "http" not in page
