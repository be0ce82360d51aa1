"""The text to learn: bytes of source files, cut into training and validation, drawn batch by batch."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

VOCABULARY = 256  # a token is a byte
_VALIDATION_SHARE = 0.05
_FILE_BREAK = b"\n\x00\n"


@dataclass(frozen=True)
class Corpus:
    """Byte tokens, and which of them are for training."""

    training: torch.Tensor
    validation: torch.Tensor

    @staticmethod
    def read(source: Path | None, limit: int) -> Corpus:
        """The first `limit` bytes of a file, of a folder's Python and text files, or of Python's standard library."""
        text = _FILE_BREAK.join(path.read_bytes() for path in _files(source))[:limit]
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = int(len(tokens) * (1 - _VALIDATION_SHARE))
        return Corpus(tokens[:cut], tokens[cut:])

    def batch(self, step: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step: the same on every rank and after a resume, as it depends on the step alone."""
        return _draw(self.training, step, rows, length)

    def validation_batch(self, index: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One of the fixed batches that validation runs over."""
        return _draw(self.validation, -1 - index, rows, length)

    def unigram_entropy(self) -> float:
        """Nats a token of a model that knows only how frequent each byte is; what knows no context cannot beat it."""
        counts = torch.bincount(self.training.long(), minlength=VOCABULARY).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)


def _files(source: Path | None) -> list[Path]:
    if source is not None and source.is_file():
        return [source]
    folder = source or Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".txt", ".md") and not skipped & set(path.relative_to(folder).parts)
    ]
    if not found:
        raise SystemExit(f"There are no .py, .txt or .md files to learn from under {folder}.")
    # Neighbouring files are alike; the hash of the name mixes them, so that the last ones are like the first.
    return sorted(found, key=lambda path: _mixed(str(path.relative_to(folder))))


def _mixed(name: str) -> int:
    value = 0
    for character in name.encode():
        value = (value * 1000003 ^ character) & 0xFFFFFFFF
    return value


def _draw(tokens: torch.Tensor, seed: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    if len(tokens) <= length + 1:
        raise SystemExit(f"The text is too short: {len(tokens)} tokens, and a sequence has {length + 1}.")
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFF)
    starts = torch.randint(0, len(tokens) - length - 1, (rows, 1), generator=generator)
    windows = tokens[starts + torch.arange(length + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
