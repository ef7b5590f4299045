"""Every example runs as it stands, packs its batches, and leaves the model as stock training would."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_helpers import declare_entry_points

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "tiny.py")
ADAPTER = EXAMPLES / "third_party_adapter"


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_and_packs(name, tmp_path, monkeypatch, capsys):
    declare_entry_points(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert "packing        on" in printed and "padding_removed" in printed and "finished" in printed


def test_the_index_lists_every_example():
    index = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}`" in index for name in [*SCRIPTS, "third_party_adapter/"])


def test_the_third_party_adapter_is_short_and_installs_and_trains(tmp_path):
    assert sum(len(path.read_text().splitlines()) for path in ADAPTER.glob("**/*.py")) < 100
    copy = tmp_path / "source"  # a build writes into the source folder
    subprocess.run(["cp", "-r", ADAPTER, copy], check=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, copy], check=True)
    path = os.pathsep.join([str(tmp_path / "site"), str(EXAMPLES), *sys.path])
    done = subprocess.run(
        [sys.executable, ADAPTER / "example.py"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "collator of the MiniTrainer" in done.stdout and "packed_batches" in done.stdout
    assert float(done.stdout.split("stock run: ")[1].split()[0]) < 1e-5
