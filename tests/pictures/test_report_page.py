"""The page of a run: what was saved stands on it, and in a browser no text runs into another."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pp_runtime.orders import build_order
from pp_runtime.pictures import write_report
from pp_runtime.timing import Timeline, simulate
from tests.helpers import api

pytestmark = api.ours_only("writes no report")
CHROMIUM = shutil.which("chromium")


def run_of(ranks: int, steps: int = 20) -> dict[str, Any]:
    return {
        "version": 1,
        "title": "a <run> & more",
        "facts": {"schedule": "1F1B", "ranks": ranks, "devices": "a device"},
        "columns": {
            "step": list(range(1, steps + 1)) + [steps],
            "training": [True] * steps + [False],
            "step_s": [0.03] * steps + [0.01],
            "compute_s": [0.02] * (steps + 1),
            "bubble": [0.25] * (steps + 1),
            "tokens_per_s": [1.5e6] * (steps + 1),
            "sent_bytes": [3.2e9] * (steps + 1),
            "loss": [5.0 / step for step in range(1, steps + 1)] + [None],
            "validation": [None] * steps + [2.5],
        },
        "ranks": [{"rank": rank, "step_s": 0.03, "compute_s": 0.02, "waiting_s": 0.006} for rank in range(ranks)],
        "memory": {"heads": ["rank", "slots"], "rows": [[str(rank), "3 (1 <MiB>)"] for rank in range(ranks)]},
        "timeline_step": steps,
    }


def timelines_of(ranks: int) -> dict[str, Timeline]:
    plan = simulate(build_order("1F1B", ranks, ranks, 8)[0]).timeline()
    return {"planned": plan, "measured": plan}


def written(path: Path, *arguments: Any) -> str:
    write_report(path, *arguments)
    return path.read_text(encoding="utf-8")


def test_what_was_saved_stands_on_the_page(tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", run_of(2), timelines_of(2))
    assert "<title>a &lt;run&gt; &amp; more</title>" in page and "3 (1 &lt;MiB&gt;)" in page
    for words in (
        "<dt>schedule</dt><dd>1F1B</dd>",
        "<dt>step time, slowest rank, median</dt><dd>30 ms</dd>",  # the evaluation is no step
        "<dt>tokens a second, median</dt><dd>1.5 M</dd>",
        "<dt>bytes sent by all ranks, median</dt><dd>3.2 GB</dd>",
        "<dt>steps</dt><dd>1 to 20</dd>",
        "bubble, planned step",
        "Step 20, planned and measured",
        "rank 1: compute 66.7%, waiting 20.0%, messages and bookkeeping 13.3%",
        'aria-label="loss: 0.25 at step 20',
        'aria-label="validation: 2.5 at step 20',
    ):
        assert words in page, words
    assert "compute_s" not in page
    assert not re.search(r"https?://|src=|<link|@import", page)  # opens without a network


def test_what_was_not_saved_is_left_out_or_said(tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", {"title": "trace.json"}, timelines_of(2))
    assert "<h2>Steps" not in page and "<h2>Memory" not in page and "Step, planned and measured" in page
    page = written(tmp_path / "page.html", run_of(2), {})
    assert "schedule.record_timeline = True" in page and "<canvas" not in page


# Prints the boxes of all texts outside of the canvases.
_BOXES = """<script>
window.addEventListener("load", () => {
  const found = [];
  for (const each of document.querySelectorAll("svg text, dt, dd, h1, h2, th, td, .legend span")) {
    const box = each.getBoundingClientRect();
    found.push([each.closest("svg") ? 1 : 0, each.textContent, box.left, box.right, box.top, box.bottom]);
  }
  const wide = document.documentElement.scrollWidth;
  document.body.innerHTML = "<pre>" + JSON.stringify([wide, found]).replace(/&/g, "&amp;").replace(/</g, "&lt;")
    + "</pre>";
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
@pytest.mark.parametrize("ranks", [2, 64])
@pytest.mark.parametrize("width", [800, 1500])
def test_in_a_browser_no_text_runs_into_another(tmp_path: Path, ranks: int, width: int) -> None:
    path = tmp_path / "page.html"
    page = written(path, run_of(ranks), timelines_of(ranks))
    path.write_text(page.replace("<head>", "<head>" + _BOXES), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r"<pre>(\[.*\])</pre>", dumped.stdout, flags=re.DOTALL)
    assert match is not None, dumped.stdout[-2000:] + dumped.stderr[-2000:]
    wide, boxes = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert wide <= width and len(boxes) > 60
    for place, (_, text, left, right, top, bottom) in enumerate(boxes):
        assert left >= -1 and right <= width + 1, text
        for _, other, other_left, other_right, other_top, other_bottom in boxes[place + 1 :]:
            apart = right <= other_left or other_right <= left or bottom <= other_top + 1 or other_bottom <= top + 1
            assert apart, (text, other)
