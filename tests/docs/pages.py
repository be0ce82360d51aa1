"""The pages of the documentation, and the code in them.

A comment before a block of Python says how the tests run it; a reader of the page sees the block alone::

    <!-- runs -->                      in a process of its own
    <!-- runs on 2 ranks -->           on two ranks that have a process group; ``rank`` is this one's number
    <!-- runs as NAME on 2 ranks -->   saved under this name and started by torchrun

More lines in the comment are Python that runs before the block. A comment that begins with ``checks`` is Python that
runs where it stands. Blocks of one page that run alike share their names, from top to bottom. A block without a comment
must be Python, and is not run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = tuple(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    )
)

_PIECE = re.compile(
    r"^<!--[ ](?P<how>runs|checks)(?P<where>[^\n]*?)(?:\n(?P<hidden>(?:(?!-->).)*?))?[ \n]*-->\n"
    r"|^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_WHERE = re.compile(r"(?: as (?P<name>[\w.]+))?(?: on (?P<ranks>\d+) ranks)?")


@dataclass(frozen=True)
class Block:
    """A piece of Python on a page: shown, or in a comment."""

    page: str
    line: int
    code: str
    how: str = ""  # "runs" or "checks"
    ranks: int = 0  # 0: a process of its own, without a process group
    name: str = ""  # of the file to start by torchrun

    def compiled(self) -> object:
        """The code object, whose tracebacks name the page's own lines."""
        return compile("\n" * (self.line - 1) + self.code, str(ROOT / self.page), "exec", dont_inherit=True)


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """All Python of a page, from top to bottom; ValueError for a comment that is none of the forms above."""
    return tuple(_blocks(page))


def _blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    before: re.Match[str] | None = None
    how, name, count = "", "", 0
    for piece in _PIECE.finditer(text):
        if piece["how"]:
            if before is not None:
                raise ValueError(f"{page}: no block of Python follows {before[0]!r}")
            where = _WHERE.fullmatch(piece["where"])
            if where is None:
                raise ValueError(f"{page}: {piece[0]!r} is none of the comments that tests/docs/pages.py knows")
            how, name, count = piece["how"], where["name"] or "", int(where["ranks"] or 0)
            if piece["hidden"]:
                yield Block(page, _line(text, piece.start("hidden")), piece["hidden"] + "\n", how, count)
            before = piece if how == "runs" else None
        elif piece["language"] == "python":
            ran = before is not None and not text[before.end() : piece.start()].strip()
            line = _line(text, piece.start("code"))
            yield Block(page, line, piece["code"], how, count, name) if ran else Block(page, line, piece["code"])
            if before is not None and not ran:
                raise ValueError(f"{page}: no block of Python follows {before[0]!r}")
            before = None
    if before is not None:
        raise ValueError(f"{page}: no block of Python follows {before[0]!r}")


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def run_blocks(rank: int, page: str, count: int, folder: str = ".") -> None:
    """One rank's part of a page, run in a folder to which it may write."""
    os.chdir(folder)
    names = {"__name__": "__page__", "rank": rank}
    for block in blocks(page):
        if block.how and block.ranks == count and not block.name:
            exec(block.compiled(), names)


def text_of(page: str) -> str:
    """The page as it stands."""
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str, begin: str) -> list[str]:
    """The indented lines of a page that begin so, without what is said of them after ``#``."""
    lines = (line.partition("  #")[0].strip() for line in text_of(page).splitlines() if line.startswith("    "))
    return [line for line in lines if line.startswith(begin)]
