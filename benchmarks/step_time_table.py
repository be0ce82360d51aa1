"""The rows that step_time.py measures, as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds, None where torch has no such schedule or nothing is split."""

    size: str
    schedule: str
    microbatches: int
    ours_ms: float
    torch_ms: float | None
    torch_over_ours: float | None
    bound_ms: float
    efficiency: float
    torch_efficiency: float | None
    efficiency_when_split: float | None


def heading(ranks: int, cores: int, microbatches: int, rounds: int) -> str:
    """How it was run, and the names of the columns."""
    columns = f"{'size':8} {'schedule':22} {'ours ms':>8} {'torch ms':>9} {'torch/ours':>10} {'bound ms':>9} "
    how = f"torch {torch.__version__}, {ranks} ranks on {min(cores, ranks)} cores, gloo, {microbatches} microbatches"
    return f"{how}, medians of {rounds} interleaved turns\n{columns}{'efficiency':>10} {'+split':>6} {'torch':>6}"


def line(row: Row) -> str:
    """A row as text."""
    theirs = f"{row.torch_ms:9.2f} {row.torch_over_ours:9.2f}x" if row.torch_ms else f"{'-':>9} {'-':>10}"
    when_split = f"{row.efficiency_when_split:6.0%}" if row.efficiency_when_split else f"{'-':>6}"
    their_efficiency = f"{row.torch_efficiency:6.0%}" if row.torch_efficiency else f"{'-':>6}"
    return (
        f"{row.size:8} {row.schedule:22} {row.ours_ms:8.2f} {theirs} {row.bound_ms:9.2f} "
        f"{row.efficiency:10.0%} {when_split} {their_efficiency}"
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows, one a line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def save_png(rows: Sequence[Row], titles: dict[str, str], path: Path) -> None:
    """A panel a size: both libraries' steps side by side, and the bound as a line across each pair."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row.size for row in rows))
    figure = Figure(figsize=(4.5 * len(sizes), 3.8), dpi=150, layout="constrained")
    for panel, name in enumerate(sizes):
        axes = figure.add_subplot(1, len(sizes), panel + 1)
        of_size = [row for row in rows if row.size == name]
        places = range(len(of_size))
        axes.bar([i + 0.2 for i in places], [row.torch_ms or 0 for row in of_size], 0.4, color="0.7", label="torch")
        axes.bar([i - 0.2 for i in places], [row.ours_ms for row in of_size], 0.4, color="#2171b5", label="pp_runtime")
        axes.hlines(
            [row.bound_ms for row in of_size],
            [i - 0.4 for i in places],
            [i + 0.4 for i in places],
            color="#cb181d",
            linewidth=1.5,
            label="the schedule's bound",
        )
        axes.set_xticks(list(places), [row.schedule for row in of_size], rotation=40, ha="right", fontsize=8)
        axes.set_title(titles[name], fontsize=9)
        axes.set_ylabel("step (ms)" if panel == 0 else "")
        axes.spines[["top", "right"]].set_visible(False)
        if panel == 0:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
