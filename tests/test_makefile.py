"""What `make` tells its user."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_has_one_line_for_each_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert {line.split()[1] for line in make("help").splitlines()} == set(phony[1].split())


def test_the_silent_installation_is_announced(tmp_path: Path) -> None:
    steps = make("--dry-run", "venv", f"VENV={tmp_path / 'venv'}").splitlines()
    announced = next(index for index, step in enumerate(steps) if "a few minutes, about 2.5 GB" in step)
    assert announced < min(index for index, step in enumerate(steps) if "pip install" in step)
