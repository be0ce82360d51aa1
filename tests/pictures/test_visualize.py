"""Pictures of timelines: text, PNG and SVG."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from pp_runtime.orders.catalogue import build_order
from pp_runtime.pictures.terminal import text_picture
from pp_runtime.pictures.visualize import draw
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


def test_timeline_saves_itself_as_png_of_the_width_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timeline = planned("1F1B", 2, 2, 2)
    timeline.save_png(tmp_path / "run.png")
    timeline.save_png(tmp_path / "wide.png", width=3000)
    assert png_width(tmp_path / "run.png") < 1500
    assert png_width(tmp_path / "wide.png") == 3000


def png_width(path: Path) -> int:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width: int = struct.unpack(">I", content[16:20])[0]
    return width


@pytest.mark.parametrize(
    ("name", "ranks", "stages", "microbatches"),
    [("Interleaved1F1B", 8, 16, 32), ("ZBVZeroBubble", 8, 16, 32), ("1F1B", 64, 64, 64), ("GPipe", 2, 2, 2000)],
)
def test_pictures_fit_a_page_whatever_is_drawn(
    tmp_path: Path, name: str, ranks: int, stages: int, microbatches: int
) -> None:
    pytest.importorskip("matplotlib")
    plan = planned(name, ranks, stages, microbatches)
    draw(tmp_path / "plan.png", {"planned": plan, "measured": plan}, title=name)
    assert png_width(tmp_path / "plan.png") <= 2000


@pytest.mark.parametrize("width", [None, 3000, 6000])
def test_numbers_stay_in_their_bars_and_equal_bars_show_theirs_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int | None
) -> None:
    figures = drawn_figures(monkeypatch)
    draw(tmp_path / "plan.png", {"planned": planned("Interleaved1F1B", 8, 16, 32)}, width=width)
    (axes,) = figures[0].axes
    zero = axes.transData.transform((0.0, 0.0))[0]
    backward = axes.transData.transform((2.0, 0.0))[0] - zero
    sizes = {text.get_fontsize() for text in axes.texts}
    # Numbers of backwards fit on a page, those of forwards, half as long, on a wider picture.
    assert len(axes.texts) == 8 * 2 * 32 * (1 if width is None else 2)
    assert min(sizes) >= 5 and len(sizes) <= 2 + (2 if width == 3000 else 0)
    for text in axes.texts:
        assert text.get_window_extent().width < backward * (1 if width is None else 0.95)


def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures: list[Any] = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, path: (figures.append(self), save(self, path)))
    return figures


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_names_of_rows_do_not_run_into_each_other_or_out_of_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    figures = drawn_figures(monkeypatch)
    plan = planned("1F1B", ranks, ranks, 4)
    draw(tmp_path / "both.png", {"planned": plan, "measured": plan})
    (axes,) = figures[0].axes
    names = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(names) == 2 * ranks and min(name.x0 for name in names) >= 0
    assert all(above.y0 >= below.y1 for above, below in zip(names, names[1:], strict=False))


def test_short_times_are_shown_in_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn_figures(monkeypatch)
    spans = tuple(Span(0, f"0F{place}", 5 + 0.01 * place, 5.01 + 0.01 * place) for place in range(4))
    draw(tmp_path / "run.png", {"measured": Timeline(spans)})
    draw(tmp_path / "plan.png", {"planned": Timeline(spans)}, unit="")
    assert [figure.axes[0].get_xlabel() for figure in figures] == ["time (ms)", "time"]
    assert figures[0].axes[0].get_xlim() == pytest.approx((0, 40))


def test_a_width_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    for width in (20, 100_000):
        with pytest.raises(ValueError, match=rf"{width} pixels cannot be drawn; give 400 to 60,000"):
            draw(tmp_path / "x.png", {"plan": planned("1F1B", 2, 2, 2)}, width=width)


def test_missing_matplotlib_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"pip install 'pp_runtime\[pictures\]'"):
        draw(tmp_path / "x.png", {"plan": planned("1F1B", 2, 2, 2)})


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(tmp_path / "x.png", {"plan": Timeline(())})
