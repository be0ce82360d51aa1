"""Spans of time as pictures: in the terminal, by matplotlib, as an HTML page, for Perfetto."""

from __future__ import annotations

from pp_runtime.pictures.html_page import write_html
from pp_runtime.pictures.palette import LOOKS
from pp_runtime.pictures.perfetto import read_chrome, read_trace, write_chrome
from pp_runtime.pictures.report_page import RUN_VERSION, write_report
from pp_runtime.pictures.spans import Span, Spans
from pp_runtime.pictures.terminal import text_picture
from pp_runtime.pictures.visualize import draw

__all__ = [
    "LOOKS",
    "RUN_VERSION",
    "Span",
    "Spans",
    "draw",
    "read_chrome",
    "read_trace",
    "text_picture",
    "write_chrome",
    "write_html",
    "write_report",
]
