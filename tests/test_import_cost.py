"""Importing the package, and even loading its plugins, pulls in no framework, no triton and no GPU context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join([str(ROOT), str(ROOT / "integrations")])

IMPORT = "import fastft_plugins"
PUBLIC_NAMES = (
    IMPORT
    + """
for name in set(fastft_plugins.__all__) - {"FastFTCallback", "FastFTPlugin"}:  # these two are a framework's classes
    getattr(fastft_plugins, name)
"""
)
LOAD_PLUGINS = (
    PUBLIC_NAMES
    + """
from fastft_plugins.manager import get_plugin_manager
assert all(status.state == "loaded" for status in get_plugin_manager().statuses)
"""
)


def in_a_fresh_process(code: str) -> Any:
    """Run code after `import torch` and return the JSON it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTFT_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [PATH, environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("code", [IMPORT, PUBLIC_NAMES, LOAD_PLUGINS], ids=["import", "public names", "load plugins"])
def test_imports_no_framework_and_makes_no_gpu_context(code: str) -> None:
    """What `import torch` itself brings along is not ours to count."""
    loaded, is_initialized = in_a_fresh_process(f"""
import json, sys, torch
before = set(sys.modules)
{code}
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
""")
    packages = {name.split(".")[0] for name in loaded}
    assert "fastft_plugins" in packages
    unwanted = {"transformers", "trl", "lightning", "pytorch_lightning", "peft", "accelerate", "datasets", "triton"}
    assert packages & unwanted == set()
    assert not is_initialized


def test_costs_at_most_a_fifth_of_importing_torch() -> None:
    """The two are timed one after the other in each process, in processor time, so that a busy machine slows both."""
    code = f"""
import json, time
start = time.process_time()
import torch
middle = time.process_time()
{PUBLIC_NAMES}
print(json.dumps((time.process_time() - middle) / (middle - start)))
"""
    assert median(in_a_fresh_process(code) for _ in range(5)) <= 0.2
