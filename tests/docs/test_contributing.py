"""CONTRIBUTING.md names files and places that exist, and what it says of them holds."""

from __future__ import annotations

import re

import pp_runtime
from tests.docs.pages import ROOT, text_of

TEXT = text_of("CONTRIBUTING.md")


def test_the_files_and_folders_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:pp_runtime|csrc|tests|docs|benchmarks|\.ci)/[\w./]*)`", TEXT))
    assert len(named) > 30
    assert not sorted(path for path in named if not (ROOT / path).exists())


def test_the_tables_have_every_room() -> None:
    rooms = {f"{path.name}/" for path in (ROOT / "pp_runtime").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(re.findall(r"^\| `(\w+/)`", TEXT, flags=re.MULTILINE))


def test_a_stream_waits_where_it_says_and_nowhere_else() -> None:
    answer = TEXT.partition("**Where does a stream wait?**")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(csrc/[\w./]+)`", answer))
    calls = r"hold_back\(|\bblock\(lane\)|synchronize_stream|StreamWaitEvent|StreamWaitValue|device\(\)\.wait\("
    waits = re.compile(calls)
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*.*")
        if waits.search(path.read_text(errors="ignore"))
    }
    assert named == found


def test_the_commands_that_are_named_are_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(re.findall(r"`[^`]+`|^    .*$", TEXT, flags=re.MULTILINE))))
    assert named and named <= targets


def test_every_version_has_its_changes() -> None:
    versions = re.findall(r"^## (\S+)", text_of("CHANGELOG.md"), flags=re.MULTILINE)
    assert versions[0] == "Unreleased" and pp_runtime.__version__ in versions
