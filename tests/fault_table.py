"""Plants every kind of fault in every schedule, and writes how long the ranks took into the table of docs/faults.md.

    python -m tests.fault_table               # every kind in every schedule, 2 and 4 ranks, both transports: minutes
    python -m tests.fault_table --runs 1      # each kind once a setting

Exit status 1 where a rank did not raise what it must, named another culprit, or was left with something.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers import ranks
from tests.helpers.faults import DEADLINE, HELD_UP, LOST, SURVIVED, Fault, Seen, complaints, draw, play_all, play_one
from tests.helpers.pipelines import EVERY_SCHEDULE

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "faults.md"
SETTINGS = [(2, "auto"), (4, "auto"), (2, "c10d"), (4, "c10d")]
LIMIT = 10.0


@dataclass
class Measured:
    """Seconds from the fault to the error: where it happened, and on the other ranks."""

    own: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=len(EVERY_SCHEDULE), help="of each kind in each setting")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=DOCUMENT)
    chosen = options.parse_args()
    generator = random.Random(chosen.seed)
    measured: dict[tuple[str, int, str], Measured] = {}
    wrong: list[str] = []
    for size, transport in SETTINGS:
        for kind in (*SURVIVED, *LOST, *HELD_UP):
            faults = [draw(generator, kind, size, EVERY_SCHEDULE[i % len(EVERY_SCHEDULE)]) for i in range(chosen.runs)]
            into = measured.setdefault((kind, size, transport), Measured())
            for fault, seen in zip(faults, _play(faults, size, transport), strict=True):
                wrong += complaints(fault, seen, LIMIT, transport)
                _add(into, fault, seen)
        print(f"{size} ranks, {transport}: {len(wrong)} complaints", flush=True)
    print("\n".join(wrong))
    _write(chosen.output, _table(measured, chosen.runs))
    return 1 if wrong else 0


def _play(faults: list[Fault], size: int, transport: str) -> list[list[Seen | None]]:
    with tempfile.TemporaryDirectory(prefix="pp-faults-") as folder:
        if faults[0].kind in SURVIVED:
            found = ranks.run(play_all, size, 300, size=size, faults=faults, folder=folder, transport=transport)
            return [list(seen) for seen in zip(*found, strict=True)]
        rows = []
        for number, fault in enumerate(faults):
            own = Path(folder, str(number))
            own.mkdir()
            deaths = [fault.owner(size)] if fault.kind in LOST else []
            arguments = {"size": size, "fault": fault, "folder": str(own), "transport": transport}
            rows.append(ranks.run(play_one, size, deaths=deaths, **arguments))
        return rows


def _add(into: Measured, fault: Fault, found: list[Seen | None]) -> None:
    for rank, seen in enumerate(found):
        if seen is not None:
            (into.own if rank == fault.owner(len(found)) else into.others).append(seen.seconds)


def _table(measured: dict[tuple[str, int, str], Measured], runs: int) -> str:
    names = {"auto": "shared memory", "c10d": "gloo"}
    columns = [f"{size} ranks, {names[transport]}" for size, transport in SETTINGS]
    lines = [
        f"| fault | its rank raises | the others raise | {' | '.join(columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for kind in (*SURVIVED, *LOST, *HELD_UP):
        own = (
            f"`{SURVIVED[kind]}`"
            if kind in SURVIVED
            else ("is gone" if kind in LOST else "`PipelineError`, once it goes on")
        )
        cells = [_cell(measured[kind, size, transport].others) for size, transport in SETTINGS]
        lines.append(f"| {kind} | {own} | `PipelineError` | {' | '.join(cells)} |")
    total = sum(len(SURVIVED) + len(LOST) + len(HELD_UP) for _ in SETTINGS) * runs
    lines += [
        "",
        f"{total} runs: each kind {runs} times in each setting, at a random stage and microbatch, over all "
        f"{len(EVERY_SCHEDULE)} schedules that train. Seconds from the fault to the error on the other ranks, median "
        f"and worst; the deadline for ranks that stop or never come back was {DEADLINE:g} s. "
        f"{os.cpu_count()} cores for all ranks, beside other work.",
    ]
    return "\n".join(lines)


def _cell(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({max(seconds):.2f})" if seconds else ""


def _write(document: Path, table: str) -> None:
    text = document.read_text()
    begin, end = "<!-- measured -->\n", "\n<!-- end -->"
    document.write_text(re.sub(f"{begin}.*?{end}", lambda _: begin + table + end, text, flags=re.DOTALL))


if __name__ == "__main__":
    sys.exit(main())
