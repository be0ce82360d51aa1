"""What README.md and docs/ show is run: blocks of Python (tests/docs/pages.py says how), commands, links."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

from pp_runtime.__main__ import main as command_line
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands, run_blocks, text_of
from tests.helpers import ranks
from tests.test_examples import is_png, run_python, torchrun

WITH_RANKS = sorted(
    {(block.page, block.ranks) for page in PAGES for block in blocks(page) if block.ranks and not block.name}
)
ALONE = sorted({block.page for page in PAGES for block in blocks(page) if block.how and not block.ranks})
PROGRAMS = [block for page in PAGES for block in blocks(page) if block.name]


@pytest.mark.parametrize("page", PAGES)
def test_what_is_marked_as_python_is(page: str) -> None:
    for block in blocks(page):
        try:
            ast.parse(block.code)
        except SyntaxError as error:
            pytest.fail(f"{page}, line {block.line + (error.lineno or 1) - 1}: {error}")


@pytest.mark.parametrize(("page", "count"), WITH_RANKS)
def test_blocks_run_on_ranks(page: str, count: int, tmp_path: Path) -> None:
    ranks.run(run_blocks, count, timeout=80, page=page, count=count, folder=str(tmp_path))


@pytest.mark.parametrize("page", ALONE)
def test_blocks_run_alone(page: str, tmp_path: Path) -> None:
    code = f"from tests.docs.pages import run_blocks; run_blocks(0, {page!r}, 0, {str(tmp_path)!r})"
    run_python("-c", code)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.page)
def test_the_whole_program_of_a_page_trains(program: Block, tmp_path: Path) -> None:
    (tmp_path / program.name).write_text(program.code)
    printed = torchrun(program.ranks, str(tmp_path / program.name))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) > 2 and losses[-1] < losses[0] / 10, printed


def test_the_picture_can_be_made_again(tmp_path: Path) -> None:
    printed = torchrun(2, str(ROOT / "docs" / "make_pictures.py"), "--output", tmp_path / "step.png")
    assert "measured: " in printed and is_png(tmp_path / "step.png")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "python -m pp_runtime ")])
def test_commands_run_and_print_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page, "python -m pp_runtime "):
        arguments = command.removeprefix("python -m pp_runtime ").split()
        if arguments == ["--help"]:
            continue
        assert command_line(arguments) == 0, command
        assert shown_after(page, command) in capsys.readouterr().out


def shown_after(page: str, command: str) -> str:
    """What the page shows that a command prints: the indented lines after "prints"; nothing where it shows nothing."""
    shown = re.search(re.escape(command) + r"\n\nprints\n\n((?:    .*\n|\n)+)", text_of(page))
    return textwrap.dedent(shown[1]).strip("\n") if shown else ""


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    text = text_of(page)
    named = set(re.findall(r"\b(?:benchmarks|examples|tests|docs)/[\w/]+\.(?:py|md|png)\b", text))
    named |= {module.replace(".", "/") + ".py" for module in re.findall(r"python -m (tests\.[\w.]+)", text)}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing, f"{page} names what does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken, f"{page} has links that lead nowhere"


def anchors(path: Path) -> set[str]:
    """The names of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_a_comment_that_means_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for text in (
        "<!-- runs on two ranks -->\n```python\n```\n",
        "<!-- runs -->\ntext\n",
        "<!-- runs -->\n\n<!-- runs -->\n",
    ):
        (tmp_path / "page.md").write_text(text)
        monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
        blocks.cache_clear()
        with pytest.raises(ValueError, match="page.md"):
            blocks("page.md")
    blocks.cache_clear()
