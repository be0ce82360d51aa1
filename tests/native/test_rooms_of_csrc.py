"""The rooms of csrc/ include each other in one direction only, as csrc/bindings.cpp lists them."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LISTED = re.findall(r"^//     (\w+)  ", (CSRC / "bindings.cpp").read_text(), flags=re.MULTILINE)


def includes() -> dict[str, set[str]]:
    """For each file of csrc, the files of csrc that it includes."""
    files = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    quoted = re.compile(r'^\s*#\s*include\s+"([^"]+)"', flags=re.MULTILINE)
    return {str(path.relative_to(CSRC)): set(quoted.findall(path.read_text())) for path in files}


def test_the_list_names_the_rooms() -> None:
    assert sorted(LISTED) == sorted(path.name for path in CSRC.iterdir() if path.is_dir())


def test_a_room_includes_rooms_below_it_only() -> None:
    floor = {room: number for number, room in enumerate(LISTED)}
    for file, included in includes().items():
        for other in included:
            assert (CSRC / other).exists(), f"{file} includes {other}, which is not written from csrc/"
            room, other_room = Path(file).parent.name, Path(other).parent.name
            if room and other_room:
                assert floor[room] <= floor[other_room], f"{file} includes {other}, of a room above it"


def test_no_files_include_each_other() -> None:
    TopologicalSorter(includes()).prepare()
