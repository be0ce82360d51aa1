"""Timelines as one self-contained HTML page: wheel zooms, dragging moves, the pointer tells about an action."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path

from pp_runtime.pictures.palette import COMMUNICATION, LOOKS, WAITING, microbatch_label, stage_places
from pp_runtime.pictures.spans import Spans


def write_html(path: str | Path, timelines: Mapping[str, Spans], *, title: str = "", unit: str = "s") -> None:
    """Write the page. Each rank has one row a timeline, all start at 0."""
    shown = {name: timeline.from_zero() for name, timeline in timelines.items()}
    ranks = sorted({rank for timeline in shown.values() for rank in timeline.ranks})
    rows = {(rank, name): place for place, (rank, name) in enumerate((r, n) for r in ranks for n in shown)}
    places = stage_places(shown.values())
    bars = []
    for name, timeline in shown.items():
        for span in timeline.spans:
            action = span.parsed()
            stage = (action.sub_actions or (action,))[0].stage_index
            colour = LOOKS[span.kind].shade(places.get(stage, 0))
            thin = int(span.kind in COMMUNICATION)
            label = "" if thin else microbatch_label(span)
            bars.append([rows[span.rank, name], span.start, span.end, span.waited, colour, label, span.action, thin])
    kinds = {span.kind for timeline in shown.values() for span in timeline.spans}
    legend = {LOOKS[kind].words: LOOKS[kind].shade() for kind in LOOKS if kind in kinds} | {"waiting": WAITING}
    data = {
        "rows": [f"rank {rank}" if len(shown) == 1 else f"rank {rank} {name}" for rank, name in rows],
        "bars": bars,
        "length": max((timeline.makespan for timeline in shown.values()), default=0.0) or 1.0,
        "unit": unit,
        "waiting": WAITING,
    }
    legend_items = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(words)}</span>' for words, colour in legend.items()
    )
    page = _PAGE.replace("@TITLE@", html.escape(title or "pipeline timeline")).replace("@LEGEND@", legend_items)
    content = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    Path(path).write_text(page.replace("@DATA@", content), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title><style>
body{font:14px system-ui,sans-serif;margin:16px;color:#16202b;background:#fff}
h1{font-size:16px}canvas{display:block;width:100%;cursor:grab}
.legend span{margin-right:16px;white-space:nowrap}
.legend i{display:inline-block;width:12px;height:12px;margin-right:5px;vertical-align:-1px}
#tip{position:fixed;display:none;background:#16202b;color:#fff;padding:4px 8px;border-radius:4px;pointer-events:none}
</style></head><body><h1>@TITLE@</h1><div class="legend">@LEGEND@</div><canvas id="c"></canvas><div id="tip"></div>
<script>
"use strict";
const data = @DATA@, ROW = 26, HEAD = 24, LEFT = 130;
const canvas = document.getElementById("c"), pen = canvas.getContext("2d"), tip = document.getElementById("tip");
let from = 0, to = data.length, drag = null;
const byRow = data.rows.map(() => []);
for (const bar of data.bars) byRow[bar[0]].push(bar);
for (const row of byRow) row.sort((a, b) => a[1] - b[1]);
const width = () => canvas.clientWidth - LEFT;
const x = time => LEFT + (time - from) / (to - from) * width();
const time = pixel => from + (pixel - LEFT) / width() * (to - from);
function paint() {
  const ratio = window.devicePixelRatio || 1, tall = HEAD + ROW * data.rows.length;
  canvas.style.height = tall + "px";
  canvas.width = canvas.clientWidth * ratio; canvas.height = tall * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, canvas.clientWidth, tall);
  pen.font = "11px system-ui,sans-serif"; pen.textBaseline = "middle";
  pen.save(); pen.beginPath(); pen.rect(LEFT, 0, width(), tall); pen.clip();
  byRow.forEach((row, place) => {
    const top = HEAD + ROW * place;
    for (const [, start, end, waited, colour, label, , thin] of row) {
      if (end < from || start > to) continue;
      const a = x(start), b = x(start + waited), c = x(end), inset = thin ? 8 : 2;
      if (waited > 0) { pen.fillStyle = data.waiting; pen.fillRect(a, top + 8, b - a, ROW - 16); }
      pen.fillStyle = colour;
      pen.fillRect(b, top + inset, Math.max(c - b - (c - b > 3 ? 1 : 0), 0.3), ROW - 2 * inset);
      if (label && pen.measureText(label).width + 2 < c - b) {
        pen.fillStyle = "#16202b"; pen.textAlign = "center"; pen.fillText(label, (b + c) / 2, top + ROW / 2);
      }
    }
  });
  const rough = (to - from) / Math.max(2, width() / 110), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  pen.fillStyle = "#5a6470"; pen.textAlign = "center";
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
    pen.fillRect(x(t), HEAD - 5, 1, 5);
    pen.fillText(+t.toPrecision(6) + (data.unit ? " " + data.unit : ""), x(t), 10);
  }
  pen.restore();
  pen.textAlign = "left"; pen.fillStyle = "#16202b";
  data.rows.forEach((name, place) => pen.fillText(name, 0, HEAD + ROW * place + ROW / 2));
}
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const at = time(event.offsetX), factor = Math.exp(event.deltaY * 0.002);
  from = at - (at - from) * factor; to = at + (to - at) * factor;
  if (to - from > data.length) { from = 0; to = data.length; }
  paint();
}, { passive: false });
canvas.addEventListener("mousedown", event => { drag = [event.clientX, from, to]; });
window.addEventListener("mouseup", () => { drag = null; });
canvas.addEventListener("mousemove", event => {
  if (drag) {
    const shift = (event.clientX - drag[0]) / width() * (drag[2] - drag[1]);
    from = drag[1] - shift; to = drag[2] - shift; paint();
  }
  const row = byRow[Math.floor((event.offsetY - HEAD) / ROW)] || [], at = time(event.offsetX);
  const bar = row.find(bar => bar[1] <= at && at <= bar[2]);
  tip.style.display = bar ? "block" : "none";
  if (bar) {
    const show = value => +value.toPrecision(4) + (data.unit ? " " + data.unit : "");
    tip.textContent = bar[6] + ": " + show(bar[1]) + " to " + show(bar[2]) + ", took " + show(bar[2] - bar[1])
      + (bar[3] > 0 ? ", of it waited " + show(bar[3]) : "");
    tip.style.left = event.clientX + 14 + "px"; tip.style.top = event.clientY + 14 + "px";
  }
});
canvas.addEventListener("mouseleave", () => { tip.style.display = "none"; });
window.addEventListener("resize", paint);
paint();
</script></body></html>
"""
