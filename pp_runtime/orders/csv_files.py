"""Orders in files: a row a rank, a column a step, in the two formats of torch.distributed.pipelining.

``compute_only`` has compute actions and empty cells where a rank is idle for a step; ``compute_comms`` has every action
and no empty cells. What is read and written again is the same file, byte for byte.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn

from pp_runtime.errors import OrderFileError
from pp_runtime.orders.ir import Action

FileFormat = Literal["compute_only", "compute_comms"]
Rows = dict[int, list[Action | None]]
"""Rank -> its cells; None is an empty one."""


def load_order(filename: str | os.PathLike[str], format: FileFormat | None = None) -> Rows:
    """The rows of a file; row r is rank r. :func:`pp_runtime.orders.ir.from_torch_form` makes an order of them.

    Raises OrderFileError that names row, column and action for a cell that is no action or does not belong in a file of
    the format; without one, both formats are read. Whether the actions make a possible order is for
    :mod:`pp_runtime.planning.verifier` to say.
    """
    _check_format(format)
    rows: Rows = {}
    try:
        with open(filename, newline="", encoding="utf-8-sig") as file:
            for rank, cells in enumerate(csv.reader(file)):
                rows[rank] = _parse_row(filename, rank, cells, format)
    except (UnicodeDecodeError, csv.Error) as error:
        raise OrderFileError(f"{os.fspath(filename)} is not a CSV file of actions: {error}.") from error
    if not any(rows.values()):
        raise OrderFileError(f"{os.fspath(filename)} has no actions.")
    return rows


def dump_order(filename: str | os.PathLike[str], order: Mapping[int, Sequence[Action | None]]) -> None:
    """Write an order, of either format, a row a rank from rank 0.

    Raises ValueError if the ranks are not 0, 1, 2 and so on: a row has no other name than its number.
    """
    if sorted(order) != list(range(len(order))):
        raise ValueError(
            f"An order for ranks {sorted(order)} cannot be written; a file's rows are ranks 0, 1, 2 and so on."
        )
    with open(filename, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(order[rank] for rank in range(len(order)))


def _check_format(format: str | None) -> None:
    if format not in (None, "compute_only", "compute_comms"):
        raise ValueError(f"format is '{format}'; the formats are 'compute_only' and 'compute_comms'.")


def _parse_row(
    filename: str | os.PathLike[str], rank: int, cells: list[str], format: FileFormat | None
) -> list[Action | None]:
    row: list[Action | None] = []
    for column, text in enumerate(cells):
        try:
            action = Action.from_str(text)
        except ValueError as error:
            _refuse(filename, rank, column, str(error))
        if action is None and format == "compute_comms":
            _refuse(filename, rank, column, "the cell is empty, which a compute_comms file does not have.")
        if action is not None and format == "compute_only" and not action.is_compute_op:
            _refuse(
                filename,
                rank,
                column,
                f"'{text}' is not a compute action; load the file with format='compute_comms', or leave it out.",
            )
        row.append(action)
    return row


def _refuse(filename: str | os.PathLike[str], rank: int, column: int, reason: str) -> NoReturn:
    raise OrderFileError(
        f"{os.fspath(filename)}, row {rank + 1} (rank {rank}), column {column + 1}: {reason}"
    ) from None
