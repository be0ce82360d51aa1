"""The rooms of pp_runtime: arrows go down, nobody reaches into another room, no two files import each other.

``python -m tests.test_rooms [checkout]`` counts: files a room, circles of imports, upward arrows, reaches into rooms.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx
import pytest

PACKAGE = "pp_runtime"
ROOT = Path(__file__).resolve().parent.parent
# From the top down; a file imports from its own floor and those below. Files beside the rooms are torch's names.
FLOORS = (
    ("__init__", "__main__", "advising", "building", "recording", "_schedule_visualizer", "_IR", "_unflatten"),
    ("schedules",),
    ("splitting",),
    ("stage", "microbatch", "_backward", "_utils"),
    ("running",),
    ("planning",),
    ("timing",),
    ("pictures",),
    ("orders",),
    ("errors", "_extension", "_torchs_place", "_debug", "_version", "_build_info", "_C"),
)
BUILT = (f"{PACKAGE}._C", f"{PACKAGE}._build_info")
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@dataclass(frozen=True, slots=True)
class Import:
    """One name that one module imports from another of the package; of the module itself where the name is one."""

    importer: str
    module: str
    name: str


class Package:
    """The modules of the package in a checkout, and what each imports: also lazily, also for type checking only."""

    def __init__(self, root: Path = ROOT) -> None:
        self.files: dict[str, Path] = {}
        for path in sorted((root / PACKAGE).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            self.files[name.removesuffix(".__init__")] = path
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.imports = [found for name in self.files for found in self._imports_of(name)]

    def is_room(self, module: str) -> bool:
        return module in self.files and self.files[module].name == "__init__.py"

    def exports(self, room: str) -> set[str]:
        """What a room's ``__all__`` lists."""
        for node in self.trees[room].body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return set(ast.literal_eval(node.value))
        return set()

    def target(self, found: Import) -> str:
        """The module that an import leads to: one it names, or the one that it takes a name from."""
        whole = f"{found.module}.{found.name}"
        return whole if whole in self.files or whole in BUILT else found.module

    def arrows(self) -> dict[str, set[str]]:
        """Which modules each module imports."""
        arrows: dict[str, set[str]] = {name: set() for name in self.files}
        for found in self.imports:
            arrows[found.importer].add(self.target(found))
        return arrows

    def rooms_around(self, module: str) -> list[str]:
        """The rooms that a module is in, itself if it is one, from the outermost in; the package is none."""
        parts = module.split(".")
        names = [".".join(parts[:length]) for length in range(2, len(parts) + 1)]
        return [name for name in names if self.is_room(name)]

    def _imports_of(self, name: str) -> Iterator[Import]:
        parts = name.split(".")
        here = parts if self.is_room(name) else parts[:-1]
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.ImportFrom):
                base = here[: len(here) + 1 - node.level] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                if module.split(".")[0] == PACKAGE:
                    yield from (Import(name, module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    module, _, last = alias.name.rpartition(".")
                    if alias.name.split(".")[0] == PACKAGE:
                        yield Import(name, module or PACKAGE, last)


def floor_of(module: str) -> int:
    """Where a module stands; a file that no floor names stands on the top one."""
    room = module.split(".")[1] if "." in module else "__init__"
    return FLOOR_OF.get(room, 0)


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, over one or more others."""
    graph = networkx.DiGraph(arrows)
    groups = networkx.strongly_connected_components(graph)
    return sorted(sorted(group) for group in groups if len(group) > 1 or any(graph.has_edge(one, one) for one in group))


def upward(package: Package) -> list[str]:
    """Arrows that lead to a higher floor."""
    return sorted(
        f"{importer} imports {module}"
        for importer, modules in package.arrows().items()
        for module in modules
        if floor_of(module) < floor_of(importer)
    )


def reaches(package: Package) -> list[str]:
    """Imports from inside a room, by a module that is not in it, of what the room does not export."""
    wrong = []
    for found in package.imports:
        around = package.rooms_around(package.target(found))
        room = next((room for room in around if not _is_in(found, room)), None)
        if room is None or room == f"{found.module}.{found.name}":
            continue
        exports = package.exports(room)
        through_the_door = found.module == room and found.name in exports
        if not through_the_door and found.module.removeprefix(f"{room}.") not in exports:
            wrong.append(f"{found.importer} reaches into {room} for {found.module}.{found.name}")
    return sorted(wrong)


def _is_in(found: Import, room: str) -> bool:
    return found.importer == room or found.importer.startswith(f"{room}.")


def survey(root: Path) -> str:
    """The numbers of a checkout."""
    package = Package(root)
    of_room = Counter(_room_of(name) for name in package.files)
    lines = [f"{count:>5} files in {room}" for room, count in sorted(of_room.items())]
    lines += [f"{len(found):>5} {what}" for what, found in _faults(package).items()]
    return "\n".join(lines)


def _room_of(module: str) -> str:
    room = module.split(".")[1] if "." in module else ""
    return room if (ROOT / PACKAGE / room / "__init__.py").exists() and room else "the package itself"


def _faults(package: Package) -> dict[str, list[str]]:
    return {
        "circles of imports": [" - ".join(group) for group in circles(package.arrows())],
        "upward arrows": upward(package),
        "reaches into other rooms": reaches(package),
    }


@pytest.mark.parametrize("fault", ["circles of imports", "upward arrows", "reaches into other rooms"])
def test_the_package_has_no(fault: str) -> None:
    assert not _faults(Package())[fault]


def test_a_room_says_what_it_is_for() -> None:
    package = Package()
    for name, tree in package.trees.items():
        if package.is_room(name):
            assert ast.get_docstring(tree), name
            assert name == PACKAGE or package.exports(name), f"{name} exports nothing"


@pytest.mark.parametrize(
    ("fault", "files"),
    [
        ("circles of imports", {"orders/a.py": "from . import b", "orders/b.py": "from pp_runtime.orders import a"}),
        (
            "circles of imports",
            {"orders/a.py": "def f():\n    from . import b", "orders/b.py": "from .a import f"},
        ),
        ("upward arrows", {"orders/a.py": "from pp_runtime.planning import b", "planning/b.py": ""}),
        ("upward arrows", {"running/a.py": "from .. import __version__"}),
        ("reaches into other rooms", {"planning/a.py": "from pp_runtime.orders.b import c", "orders/b.py": "c = 1"}),
        ("reaches into other rooms", {"planning/a.py": "from pp_runtime.orders import b", "orders/b.py": ""}),
        ("reaches into other rooms", {"planning/a.py": "from pp_runtime.orders import c"}),
    ],
)
def test_it_would_be_found(fault: str, files: dict[str, str], tmp_path: Path) -> None:
    for room in ("", "orders", "planning", "running"):
        (tmp_path / PACKAGE / room).mkdir()
        (tmp_path / PACKAGE / room / "__init__.py").write_text("__all__ = ['d']")
    assert not _faults(Package(tmp_path))[fault]
    for path, text in files.items():
        (tmp_path / PACKAGE / path).write_text(text)
    assert _faults(Package(tmp_path))[fault]


if __name__ == "__main__":
    print(survey(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
