"""Timelines as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from pp_runtime.pictures.spans import Spans
from pp_runtime.pictures.timeline_view import PAGE_STYLE, VIEW_STYLE, view_of


def write_html(path: str | Path, timelines: Mapping[str, Spans], *, title: str = "", unit: str = "s") -> None:
    """Write the page. Each rank has one row a timeline, all start at 0; it is dark where the reader's system is."""
    title = html.escape(title or "pipeline timeline")
    Path(path).write_text(
        page_of(title, f"<h1>{title}</h1>{view_of(timelines, unit)}", PAGE_STYLE + VIEW_STYLE), encoding="utf-8"
    )


def page_of(title: str, body: str, style: str) -> str:
    """A whole page; the title and the body are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>\n{style}</style></head><body>{body}</body></html>\n'
