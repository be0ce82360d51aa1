"""The losses of a run: a line of JSON each, so that a resumed run goes on where it stopped, and their picture."""

from __future__ import annotations

import json
from pathlib import Path


class History:
    """Training and validation losses by step, kept in a file. One rank owns it."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Go on after `resumed_at` steps; later records of an earlier attempt are dropped."""
        self._path = path
        lines = path.read_text().splitlines() if resumed_at and path.exists() else []
        self.records = [record for record in map(json.loads, lines) if record["step"] <= resumed_at]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, step: int, **values: float) -> None:
        """Append the values of a step."""
        self.records.append({"step": step, **values})
        with self._path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps that have the value, and the values."""
        having = [record for record in self.records if name in record]
        return [record["step"] for record in having], [record[name] for record in having]

    def save_png(self, path: Path, unigram_entropy: float) -> None:
        """Draw the losses over the steps, with what a model without context could reach at best."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(unigram_entropy, color="0.4", linestyle="--", linewidth=1, label="unigram entropy of the text")
        axes.plot(*self.series("loss"), color="#9ecae1", linewidth=1, label="training")
        steps, losses = self.series("validation_loss")
        axes.plot(steps, losses, color="#08519c", marker="o", markersize=3, label="validation")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a byte)")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path)
