"""The HTML page of timelines: what it holds, and in a browser where there is one what it draws."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pp_runtime.orders.catalogue import ORDERS, build_order
from pp_runtime.pictures.html_page import write_html
from pp_runtime.timing.costs import Costs
from pp_runtime.timing.simulation import simulate
from pp_runtime.timing.timeline import Span, Timeline

CHROMIUM = shutil.which("chromium")


def data_of(page: str) -> dict[str, Any]:
    match = re.search(r"^const data = (\{.*\});$", page, flags=re.MULTILINE)
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


def page_of(path: Path, timelines: dict[str, Timeline], unit: str = "s") -> str:
    write_html(path, timelines, title="a < b", unit=unit)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(ORDERS))
def test_page_holds_every_action_and_asks_for_nothing_else(tmp_path: Path, name: str) -> None:
    stages = 4 if ORDERS[name].stages_per_rank_allowed != (1,) else 2
    order, _ = build_order(name, 2, stages, 4)
    page = page_of(tmp_path / "page.html", {"plan": simulate(order, Costs(transfer=0.1)).timeline()})
    data = data_of(page)
    words = {f"rank {rank}: {action}" for rank, actions in order.items() for action in actions}
    assert {data["spans"][bar[7]][0] for bar in data["bars"]} == {span[0] for span in data["spans"]} == words
    assert "a &lt; b" in page
    assert "http" not in page and "@" not in page.replace("@media", "")


def test_legend_says_what_lighter_means_where_ranks_have_several_stages(tmp_path: Path) -> None:
    one = page_of(tmp_path / "one.html", {"plan": simulate(build_order("1F1B", 2, 2, 2)[0]).timeline()})
    two = page_of(tmp_path / "two.html", {"plan": simulate(build_order("DualPipeV", 2, 4, 4)[0]).timeline()})
    assert "lighter: a rank's later stages" not in one
    assert "lighter: a rank&#x27;s later stages" in two
    for words in ("F forward", "B full backward", "I backward for inputs", "W backward for weights"):
        assert words in two


def test_page_says_how_to_zoom_and_is_dark_where_the_system_is(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", {"plan": simulate(build_order("1F1B", 2, 2, 2)[0]).timeline()})
    assert "Ctrl and the wheel zoom, dragging moves, a double click shows all" in page
    assert "prefers-color-scheme:dark" in page


def test_what_was_waited_stands_before_what_was_done(tmp_path: Path) -> None:
    timeline = Timeline((Span(0, "0F0", 1.0, 1.01), Span(0, "0RECV_B0", 1.01, 1.05, 0.03)))
    data = data_of(page_of(tmp_path / "page.html", {"run": timeline}))
    assert data["unit"] == "ms"
    times = [(round(bar[1], 6), round(bar[2], 6), bar[5]) for bar in data["bars"]]
    assert [time[:2] for time in times] == [(0, 10), (10, 40), (40, 50)]
    assert times[1][2] == "--waiting"


# Notes every text that the page draws, with its box, in an element that --dump-dom prints.
_SPY = """<script>
const drawn = [], fill = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const box = this.measureText(text);
  drawn.push([this.canvas.id, text, x - box.actualBoundingBoxLeft, x + box.actualBoundingBoxRight,
    y - box.actualBoundingBoxAscent, y + box.actualBoundingBoxDescent, this.canvas.clientWidth]);
  fill.call(this, text, x, y);
};
window.addEventListener("load", () => {
  drawn.length = 0; paint();
  document.body.innerHTML = "<pre>" + JSON.stringify(drawn).replace(/&/g, "&amp;") + "</pre>";
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
@pytest.mark.parametrize(("ranks", "timelines"), [(2, 1), (8, 2), (64, 1), (64, 2)])
def test_in_a_browser_no_text_is_cut_off_or_runs_into_another(tmp_path: Path, ranks: int, timelines: int) -> None:
    plan = simulate(build_order("1F1B", ranks, ranks, 32)[0]).timeline()
    path = tmp_path / "page.html"
    page = page_of(path, {"planned": plan, "measured": plan} if timelines == 2 else {"planned": plan})
    path.write_text(page.replace("<head>", "<head>" + _SPY), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,900", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r"<pre>(\[.*\])</pre>", dumped.stdout, flags=re.DOTALL)
    assert match is not None, dumped.stdout[-2000:] + dumped.stderr[-2000:]
    texts = json.loads(match[1])
    assert len(texts) > ranks * timelines + 3
    for _, text, left, right, _, _, width in texts:
        assert left >= -1 and right <= width + 1, text
    for canvas in ("axis", "rows"):
        boxes = [box for box in texts if box[0] == canvas]
        rows: dict[float, list[Any]] = {}
        for box in boxes:
            rows.setdefault((box[4] + box[5]) // 2, []).append(box)
        for row in rows.values():
            row.sort(key=lambda box: box[2])
            assert all(one[3] <= other[2] for one, other in zip(row, row[1:], strict=False))
    names = [box for box in texts if "rank" in box[1] or box[1] == "measured"]
    assert len(names) == ranks * timelines
    assert min(name[5] - name[4] for name in names) > 7  # large enough to read
    # Times stand above the bars, which begin 10 pixels after the names.
    assert min(box[2] for box in texts if box[0] == "axis") >= max(name[3] for name in names) + 8
    assert all(above[5] <= below[4] for above, below in zip(names, names[1:], strict=False))
