"""A canvas of timelines in an HTML page, which zooms, moves and tells about the action under the pointer."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping

from pp_runtime.pictures.layout import Layout
from pp_runtime.pictures.palette import INK, WAITING
from pp_runtime.pictures.spans import Span, Spans

PAGE_STYLE = """:root{color-scheme:light dark;
--ink:#16202b;--paper:#fff;--quiet:#5a6470;--line:#d5d9de;--waiting:#e6e6e6}
@media(prefers-color-scheme:dark){:root{
--ink:#e4e8ec;--paper:#14181d;--quiet:#9aa5b1;--line:#323942;--waiting:#3b434d}}
body{font:14px system-ui,sans-serif;margin:16px;color:var(--ink);background:var(--paper)}
h1{font-size:16px;margin:0 0 8px}
"""
"""Of any page: its colours, in the light and in the dark."""
VIEW_STYLE = """canvas{display:block;width:100%}
#rows{cursor:grab;touch-action:pan-y}#axis{position:sticky;top:0;background:var(--paper)}
.legend span{margin-right:16px;white-space:nowrap}
.legend i{display:inline-block;width:20px;height:12px;margin-right:5px;vertical-align:-1px}
.hint{color:var(--quiet);margin:6px 0}.hint button{font:inherit;min-width:2em;margin-right:4px}
#tip{position:fixed;display:none;background:var(--ink);color:var(--paper);padding:4px 8px;border-radius:4px;
pointer-events:none;white-space:nowrap}
"""


def view_of(timelines: Mapping[str, Spans], unit: str) -> str:
    """The canvas with its legend and its script, for the body of a page with the two styles."""
    layout = Layout.of(timelines, unit)
    content = json.dumps(_data(layout), separators=(",", ":")).replace("</", "<\\/")
    return _VIEW.replace("@LEGEND@", _legend(layout)).replace("@DATA@", content)


def _data(layout: Layout) -> dict[str, object]:
    spans: dict[tuple[int, Span], int] = {}  # an overlap has two bars
    bars = []
    for bar in layout.bars():
        place = spans.setdefault((bar.row, bar.span), len(spans))
        bars.append([bar.row, bar.start, bar.end, bar.top, bar.height, _colour(bar.colour), bar.label, place])
    several = len(layout.timelines) > 1
    names = [f"rank {rank} {name}" if several else f"rank {rank}" for rank, name in layout.rows]
    return {
        "rows": layout.row_names,
        "together": max(1, len(layout.timelines)),
        "bars": bars,
        "spans": [[f"{names[row]}: {span.action}", span.start, span.end, span.waited] for row, span in spans],
        "length": layout.length,
        "unit": layout.unit,
        "ink": INK,
    }


def _colour(colour: str) -> str:
    """Waiting is the background's neighbour, in the dark too: its name in the page's style sheet."""
    return "--waiting" if colour == WAITING else colour


def _legend(layout: Layout) -> str:
    items = {}
    for words, colours in layout.legend().items():
        first, last = (
            f"var({name})" if name.startswith("--") else name for name in map(_colour, (colours[0], colours[-1]))
        )
        items[words] = f"linear-gradient(90deg,{first},{last})"
    return legend_of(items)


def legend_of(backgrounds: Mapping[str, str]) -> str:
    """Words, each beside a patch with this background."""
    return (
        '<div class="legend">'
        + "".join(
            f'<span><i style="background:{background}"></i>{html.escape(words)}</span>'
            for words, background in backgrounds.items()
        )
        + "</div>"
    )


_VIEW = """@LEGEND@
<p class="hint"><button id="in" title="zoom in">+</button><button id="out" title="zoom out">&minus;</button>
<button id="all">all</button> Ctrl and the wheel zoom, dragging moves, a double click shows all; so do the keys +, -,
arrows and 0. Point at an action to read its times.</p>
<canvas id="axis"></canvas><canvas id="rows"></canvas><div id="tip"></div>
<script>
"use strict";
const data = @DATA@;
const HEAD = 26, GAP = 10, SMALLEST = 8;
const get = name => document.getElementById(name), axis = get("axis"), canvas = get("rows"), tip = get("tip");
const font = size => size + "px system-ui,sans-serif";
const byRow = data.rows.map(() => []);
for (const bar of data.bars) byRow[bar[0]].push(bar);
const longest = data.bars.reduce((most, bar) => Math.max(most, bar[6].length), 1);  // so that 9 is as large as 10
let from = 0, to = data.length, drag = null, left = 0, tall = 28, colours = {};
const width = () => canvas.clientWidth - left;
const x = time => left + (time - from) / (to - from) * width();
const time = pixel => from + (pixel - left) / width() * (to - from);
const styles = getComputedStyle(document.body);
const colour = name => name[0] === "#" ? name : colours[name] ||= styles.getPropertyValue(name);
const show = value => +value.toPrecision(4) + (data.unit ? " " + data.unit : "");
function pen(on, height) {
  const ratio = window.devicePixelRatio || 1, drawn = on.getContext("2d");
  on.style.height = height + "px";
  on.width = Math.round(on.clientWidth * ratio); on.height = Math.round(height * ratio);
  drawn.setTransform(ratio, 0, 0, ratio, 0, 0);
  drawn.textBaseline = "middle";
  return drawn;
}
function paint() {
  const room = window.innerHeight - HEAD - axis.offsetTop - 2 * GAP;
  tall = Math.max(14, Math.min(28, Math.floor(room / data.rows.length)));
  const ruler = pen(axis, HEAD);
  ruler.font = font(Math.min(12, tall - 2));
  left = Math.ceil(Math.max(...data.rows.map(name => ruler.measureText(name).width))) + GAP;
  paintRows(pen(canvas, tall * data.rows.length));
  paintAxis(ruler);
}
function paintAxis(on) {
  on.font = font(11); on.fillStyle = colour("--quiet");
  const rough = (to - from) / Math.max(2, width() / 110), power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough * (1 - 1e-9));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  for (let mark = Math.ceil(from / step); mark * step <= to; mark++) {
    const text = (mark * step).toFixed(digits) + (data.unit ? " " + data.unit : ""), at = x(mark * step);
    const wide = on.measureText(text).width;  // the first and the last stand inside
    on.fillText(text, Math.max(left, Math.min(at - wide / 2, axis.clientWidth - wide)), 10);
    on.fillRect(Math.min(at, axis.clientWidth - 1), HEAD - 6, 1, 6);
  }
}
function paintRows(on) {
  on.font = font(Math.min(12, tall - 2));
  data.rows.forEach((name, place) => {
    on.fillStyle = colour("--ink"); on.textAlign = "right"; on.fillText(name, left - GAP, tall * (place + 0.5));
    on.fillStyle = colour("--line");
    if (place % data.together === 0) on.fillRect(0, tall * place, canvas.clientWidth, 1);
  });
  on.save(); on.beginPath(); on.rect(left, 0, width(), canvas.clientHeight); on.clip(); on.textAlign = "center";
  const inner = tall - 3;
  byRow.forEach((row, place) => {
    for (const [, start, end, above, share, fill, label] of row) {
      if (end < from || start > to) continue;
      const a = x(start), b = x(end), top = tall * place + 2 + inner * above, high = inner * share;
      on.fillStyle = colour(fill);
      on.fillRect(a, top, Math.max(b - a - (b - a > 3 ? 1 : 0), 0.3), high - (share < 1 && above === 0 ? 0.5 : 0));
      const size = Math.min(12, high * 0.85, (b - a - 3) / (0.66 * longest));
      if (!label || size < SMALLEST) continue;
      on.font = font(size); on.fillStyle = data.ink; on.fillText(label, (a + b) / 2, top + high / 2);
    }
  });
  on.restore();
}
function look(first, last) {
  const span = Math.min(data.length, Math.max(data.length * 1e-5, last - first));
  from = Math.max(0, Math.min(first, data.length - span)); to = from + span;
  paint();
}
const zoom = (factor, at = (from + to) / 2) => look(at - (at - from) * factor, at + (to - at) * factor);
const move = share => look(from + share * (to - from), to + share * (to - from));
const all = () => look(0, data.length);
get("in").onclick = () => zoom(0.5); get("out").onclick = () => zoom(2); get("all").onclick = all;
canvas.addEventListener("dblclick", all);
canvas.addEventListener("wheel", event => {
  const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
  if (event.ctrlKey || event.metaKey) zoom(Math.exp(event.deltaY * 0.002), time(event.offsetX));
  else if (sideways) move(sideways / width());
  else return;  // the page scrolls
  event.preventDefault();
}, { passive: false });
window.addEventListener("keydown", event => {
  const keys = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": all,
    ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2) };
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault(); keys[event.key]();
});
canvas.addEventListener("pointerdown", event => {
  drag = [event.clientX, from, to]; canvas.setPointerCapture(event.pointerId); canvas.style.cursor = "grabbing";
});
canvas.addEventListener("pointerup", () => { drag = null; canvas.style.cursor = ""; });
canvas.addEventListener("pointermove", event => {
  if (drag) {
    const shift = (event.clientX - drag[0]) / width() * (drag[2] - drag[1]);
    look(drag[1] - shift, drag[2] - shift);
  }
  const row = byRow[Math.floor(event.offsetY / tall)] || [], at = time(event.offsetX);
  const bar = event.offsetX >= left && row.find(bar => bar[1] <= at && at <= bar[2]);
  tip.style.display = bar ? "block" : "none";
  if (!bar) return;
  const [words, start, end, waited] = data.spans[bar[7]];
  tip.textContent = words + ": " + show(start) + " to " + show(end) + ", took " + show(end - start)
    + (waited > 0 ? ", of it waited " + show(waited) : "");
  tip.style.left = Math.max(0, Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 4) + "px";
});
canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
window.addEventListener("resize", paint);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = {}; paint(); });
paint();
</script>"""
