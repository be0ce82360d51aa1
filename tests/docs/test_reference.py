"""Nothing that a user may name is missing from the pages: public names, schedules, environment variables."""

from __future__ import annotations

import re

import pp_runtime
from pp_runtime import errors
from pp_runtime.schedules.registry import SCHEDULE_CLASSES
from tests.docs.pages import PAGES, ROOT, text_of

REFERENCE = "\n".join(text_of(page) for page in PAGES if page.startswith("docs/api/"))


def test_every_public_name_is_in_the_reference() -> None:
    of_errors = {name for name in vars(errors) if name in pp_runtime.__all__}  # their page has the whole module
    torchs = {"Pipe", "SplitPoint", "pipe_split"}
    assert all(f"`{name}`" in REFERENCE for name in torchs)
    public = {name for name in pp_runtime.__all__ if not name.startswith("_")} - of_errors - torchs
    assert not sorted(name for name in public if f"::: pp_runtime.{name}\n" not in REFERENCE)


def test_every_schedule_is_in_the_table() -> None:
    rows = "\n".join(re.findall(r"^\| `.*$", text_of("docs/schedules.md"), flags=re.MULTILINE))
    assert not sorted(name for name in SCHEDULE_CLASSES if f"`{name}`" not in rows and "PipelineSchedule" not in name)


def test_every_environment_variable_is_in_the_table() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "pp_runtime").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"\bPP_RUNTIME_[A-Z]+\b", path.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `(PP_RUNTIME_\w+)`", text_of("docs/from_torch.md"), flags=re.MULTILINE))
    assert listed == read
