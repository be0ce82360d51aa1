"""The build says what it made, refuses what it cannot make, and the README's commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pp_runtime import _build_info

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


def test_the_readmes_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert named and named <= targets


def test_torch_is_pinned_to_the_build_on_the_disk() -> None:
    assert "torch==2.13.0\n" in (ROOT / "requirements-dev.txt").read_text()
