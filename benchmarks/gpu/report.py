"""The results of all steps as one JSON file and as one page of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.driver import Outcome

MACHINE = "machine"  # the step whose facts stand above all
_OF_EVERY_NUMBER = ("card", "torch", "cuda", "nccl", "driver")


def write(folder: Path, heading: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write gpu.json and gpu.txt."""
    whole = as_json(heading, outcomes)
    (folder / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "gpu.txt").write_text(as_text(whole))


def as_json(heading: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Each number says its unit and what it was measured on."""
    machine = {
        record["name"]: record["value"]
        for outcome in outcomes
        if outcome.name == MACHINE
        for record in outcome.records
        if record["kind"] == "fact"
    }
    on = {name: machine.get(name, "unknown") for name in _OF_EVERY_NUMBER}
    found: dict[str, list[dict[str, Any]]] = {"number": [], "check": [], "note": [], "not run": []}
    for outcome in outcomes:
        for record in outcome.records:
            if record["kind"] in found:
                kept = {key: value for key, value in record.items() if key != "kind"}
                found[record["kind"]].append({"step": outcome.name, **kept, **(on if "value" in kept else {})})
    return {
        **heading,
        "machine": machine,
        "steps": [{key: value for key, value in asdict(one).items() if key != "records"} for one in outcomes],
        "numbers": found["number"],
        "checks": found["check"],
        "notes": found["note"],
        "not_run": found["not run"],
    }


def as_text(whole: Mapping[str, Any]) -> str:
    """One page."""
    machine = whole["machine"]
    lines = [f"pp_runtime {whole['commit']}, --device {whole['device']}, {whole['began']}, {whole['seconds']:.0f} s"]
    if whole["device"] != "cuda":
        lines.append("A DRY RUN on the asynchronous device: the numbers say nothing about a GPU.")
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()) or "machine: unknown", ""]
    for step in whole["steps"]:
        lines.append(_line_of(step, [one for one in whole["checks"] if one["step"] == step["name"]]))
        lines += [f"    | {line[:150]}" for line in step["last_lines"][-6:]]
    lines += [f"not run: {part['step']}, {part['what']}: {part['reason']}" for part in whole["not_run"] if part["what"]]
    for one in whole["checks"]:
        if not one["passed"]:
            lines += [f"WRONG: {one['step']}, {one['name']}", *(f"    | {text[-150:]}" for text in one["problems"])]
    tables = dict.fromkeys(number["table"] for number in whole["numbers"])
    for table in tables:
        lines += ["", table, *_table([number for number in whole["numbers"] if number["table"] == table])]
    lines += ["", *dict.fromkeys(f"{one['step']}: {one['text']}" for one in whole["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _line_of(step: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> str:
    passed = sum(one["passed"] for one in checks)
    counted = f", {passed} of {len(checks)} checks passed" if checks else ""
    reason = f": {step['reason']}" if step["reason"] else ""
    return f"{step['name']:<16} {step['seconds']:6.1f} s  {step['status']}{reason}{counted}"


def _table(numbers: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Units stand at the head of a column, or, where its rows differ in them, beside each number."""
    units: dict[str, set[str]] = {}
    for number in numbers:
        units.setdefault(number["column"], set()).add(number["unit"])
    heads = {name: f"{name} ({unit})" if (unit := min(of)) and len(of) == 1 else name for name, of in units.items()}
    cells: dict[str, dict[str, str]] = {}
    for number in numbers:
        unit = f" {number['unit']}" if len(units[number["column"]]) > 1 else ""
        cells.setdefault(number["row"], {})[number["column"]] = (_text(number["value"]) + unit).rstrip()
    first = max(map(len, cells))
    widths = {name: max(len(head), *(len(row.get(name, "")) for row in cells.values())) for name, head in heads.items()}
    yield " " * first + "".join(f"  {head:>{widths[name]}}" for name, head in heads.items())
    for row, of_row in cells.items():
        yield f"{row:<{first}}" + "".join(f"  {of_row.get(name, '-'):>{width}}" for name, width in widths.items())


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
