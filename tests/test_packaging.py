"""The build says what it made, refuses what it cannot make, and the README's commands exist."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from pp_runtime import _C, _build_info

ROOT = Path(__file__).resolve().parent.parent


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_build_knows_its_torch() -> None:
    assert torch.__version__ == _build_info.TORCH_VERSION


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_forced_cuda_build_says_what_is_missing() -> None:
    made = setup_py("--name", PP_RUNTIME_CUDA="1")
    assert made.returncode != 0
    assert "has no CUDA" in made.stderr
    assert "Traceback" not in made.stderr


def test_an_unknown_choice_of_build_is_refused() -> None:
    made = setup_py("--name", PP_RUNTIME_CUDA="yes")
    assert made.returncode != 0
    assert "PP_RUNTIME_CUDA is 'yes'" in made.stderr


def test_a_missing_compiler_is_named_with_its_mend(tmp_path: Path) -> None:
    made = setup_py("build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}", CXX="no-such-compiler")
    assert made.returncode != 0
    assert "'no-such-compiler' is not on the PATH" in made.stderr and "apt install g++" in made.stderr
    assert "Traceback" not in made.stderr and len(made.stderr.splitlines()) == 1


def test_every_module_is_installed_and_no_test(tmp_path: Path) -> None:
    made = setup_py("--quiet", "build_py", f"--build-lib={tmp_path}")
    assert made.returncode == 0, made.stderr
    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    package = ROOT / "pp_runtime"
    sources = [*package.rglob("*.py"), *package.rglob("*.pyi"), package / "py.typed"]
    assert installed == {str(path.relative_to(ROOT)) for path in sources}


def test_the_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    made = setup_py("--quiet", "egg_info", f"--egg-base={tmp_path}", "sdist", f"--dist-dir={tmp_path}")
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    needed = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "pp_runtime").rglob("*.pyi")]
    named = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "pp_runtime/py.typed"}
    assert {str(path.relative_to(ROOT)) for path in needed} | named <= packed
    assert not {name for name in packed if name.startswith("tests/") or name.endswith((".so", "_build_info.py"))}


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """The package as it is, in a folder of its own, to be spoilt there."""
    return shutil.copytree(ROOT / "pp_runtime", tmp_path / "pp_runtime")


def error_of_importing(package: Path) -> str:
    """The last line that a failing import prints."""
    imported = subprocess.run(
        [sys.executable, "-c", "import pp_runtime"],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert imported.returncode != 0
    return imported.stderr.strip().splitlines()[-1]


def test_importing_without_the_extension_says_how_to_build_it(copied_package: Path) -> None:
    for library in copied_package.glob("_C*.so"):
        library.unlink()
    error = error_of_importing(copied_package)
    assert "has not been built" in error and "make build" in error


def test_importing_beside_another_torch_is_refused(copied_package: Path) -> None:
    (copied_package / "_build_info.py").write_text('TORCH_VERSION = "1.2.3"\nCUDA = False\n')
    error = error_of_importing(copied_package)
    assert "built for torch 1.2.3" in error and torch.__version__ in error


def test_the_stub_names_what_the_extension_has() -> None:
    stub = ast.parse((ROOT / "pp_runtime" / "_C.pyi").read_text())
    stubbed = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    stubbed |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    public = {name for name in dir(_C) if not name.startswith("__")}
    assert {name for name in stubbed if not name.startswith("__")} == public


def test_the_readmes_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert named and named <= targets


def test_torch_is_pinned_to_the_build_on_the_disk() -> None:
    assert "torch==2.13.0\n" in (ROOT / "requirements-dev.txt").read_text()


def test_the_version_stands_in_one_place() -> None:
    import pp_runtime

    made = setup_py("--version", PP_RUNTIME_CUDA="0")
    assert made.stdout.split()[-1] == pp_runtime.__version__, made.stderr
    assert pp_runtime.__version__ not in (ROOT / "pyproject.toml").read_text()
