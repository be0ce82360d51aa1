"""Prints the table of docs/composition.md: every schedule with every way to wrap its stages, as measured.

python -m tests.composition_table
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from tests.helpers import ranks
from tests.helpers.pipelines import EVERY_SCHEDULE
from tests.helpers.wrapped_models import KINDS, SCALINGS, compare_with_plain


def _cells(rank: int, schedule: str) -> dict[str, list[str]]:
    """For each kind, the scalings with which some rank's gradients are not the plain model's."""
    cells: dict[str, list[str]] = {}
    for kind in KINDS:
        differing = [scaling for scaling in SCALINGS if compare_with_plain(rank, schedule, kind, scaling)]
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, differing)
        cells[kind] = sorted({scaling for each in everybody for scaling in each})
    return cells


def main() -> None:
    columns = {name: ranks.run(_cells, 4, timeout=300, schedule=name)[0] for name in EVERY_SCHEDULE}
    print("| | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for kind in KINDS:
        cells = [", ".join(column[kind]) + " differ" if column[kind] else "=" for column in columns.values()]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
