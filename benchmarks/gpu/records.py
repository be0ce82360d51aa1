"""What a step found, a line of JSON each, written at once: what a step that is killed had found is kept.

A number stands in a table, at a row and a column; a check passed or not. Ranks write too, rank 0 for all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "PP_GPU_RECORDS"  # names the file in the environment of a step; without it a record is printed


class NotRun(Exception):
    """A step, or a part of one, cannot be run here; the text says why."""


def number(table: str, row: str, column: str, value: float | str, unit: str) -> None:
    """One measured number, or what came in its place."""
    _write({"kind": "number", "table": table, "row": row, "column": column, "value": value, "unit": unit})


def check(name: str, problems: list[str], seconds: float) -> None:
    """Something that is right, or what is wrong with it."""
    _write({"kind": "check", "name": name, "passed": not problems, "problems": problems[:5], "seconds": seconds})


def note(text: str) -> None:
    """A sentence that a reader of the numbers needs."""
    _write({"kind": "note", "text": text})


def not_run(what: str, reason: str) -> None:
    """A part of a step that was left out; of the whole step where ``what`` is empty."""
    _write({"kind": "not run", "what": what, "reason": reason})


def fact(name: str, value: Any) -> None:
    """Something of the machine."""
    _write({"kind": "fact", "name": name, "value": value})


def done(item: str) -> None:
    """Ranks that work through a list are past this item."""
    _write({"kind": "done", "item": item})


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file; a line that a killed process did not finish is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _write(record: dict[str, Any]) -> None:
    line = json.dumps(record) + "\n"
    if FILE not in os.environ:
        print(line, end="", flush=True)
        return
    descriptor = os.open(os.environ[FILE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
