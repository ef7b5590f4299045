"""What every test shares: one CPU thread, fixed seeds, no leaked environment variables; without a GPU no GPU tests,
and Triton under its interpreter."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import pytest
import torch

from fastft_plugins import manager as manager_module
from fastft_plugins.manager import PluginManager

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which importing torch does not do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Frameworks set these while they are imported or run, and keep them.
SET_BY_FRAMEWORKS = (
    "ACCELERATE_",
    "CUDA_",
    "HF_",
    "KMP_",
    "NCCL_",
    "PL_",
    "PYTEST_",
    "TORCH",
    "TOKENIZERS_",
    "TRITON_",
)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny models gain nothing from more, and threads that wait for each other cost much


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """Fail a test that leaves environment variables changed, and put them back for the tests after it."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    leaked = sorted(name for name in names if not name.startswith(SET_BY_FRAMEWORKS))
    for name in leaked:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    if leaked:
        pytest.fail(f"environment variables changed and not restored: {', '.join(leaked)}; use monkeypatch.setenv")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture
def plugin_manager(monkeypatch: pytest.MonkeyPatch) -> PluginManager:
    """A fresh manager, which `get_plugin_manager()` returns during the test."""
    for variable in ("FASTFT_PLUGINS", "FASTFT_TRACE", "FASTFT_STRICT_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    manager = PluginManager()
    monkeypatch.setattr(manager_module, "_manager", manager)
    return manager
