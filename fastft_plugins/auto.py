"""What ``fastft run`` switches on in scripts that know nothing of fastft, told by three environment variables.

``FASTFT_AUTO=1`` gives every Trainer that is made its switch, ``FASTFT_CONFIG`` has the fields of `FastFTConfig` as
JSON, and ``FASTFT_REPORT`` names a file for the report. Every Python process below ``fastft run`` imports this module,
so it imports almost nothing, and waits until the program itself has imported a training framework.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fastft_plugins.variables import is_set

if TYPE_CHECKING:
    from fastft_plugins.config import FastFTConfig
    from fastft_plugins.report import Report

AUTO, CONFIG, REPORT = "FASTFT_AUTO", "FASTFT_CONFIG", "FASTFT_REPORT"

logger = logging.getLogger("fastft")

# A framework's module, and the module of its adapter whose `switch_on` is called as soon as that is imported.
_SWITCHES = {
    "transformers.trainer": "fastft_hf.auto",
    "lightning.pytorch": "fastft_lightning.auto",
    "pytorch_lightning": "fastft_lightning.auto",
}


def is_on() -> bool:
    """Whether the Trainers of this process are to be switched on."""
    return is_set(AUTO)


def config() -> FastFTConfig:
    """The settings for all of them.

    Raises:
        FastFTConfigError: FASTFT_CONFIG is no JSON, or holds a wrong setting.
    """
    from fastft_plugins.config import FastFTConfig
    from fastft_plugins.errors import FastFTConfigError

    text = os.environ.get(CONFIG) or "{}"
    try:
        return FastFTConfig.from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise FastFTConfigError(
            f'{CONFIG}={text!r} is not valid JSON ({error}); allowed: an object such as {{"packing": "on"}}'
        ) from error
    except FastFTConfigError as error:
        raise FastFTConfigError(f"{CONFIG}: {error}") from error


def announce(report: Report) -> None:
    """Show the report of a training that has ended, in the process that speaks for all; the script does not know it."""
    file = os.environ.get(REPORT)
    if file:
        try:
            Path(file).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:  # no reason to fail a training that has succeeded
            logger.warning("fastft: the report was not saved, %s cannot be written (%s)", file, error.strerror)
    with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more: a pipe that has ended, say
        print(f"\n{report}", file=sys.stderr, flush=True)


def wait_for_frameworks() -> None:
    """With FASTFT_AUTO=1, call each adapter's ``switch_on`` when its framework has been imported; else do nothing."""
    if is_on():
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Lets the other finders find a framework's module, and looks on while it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _SWITCHES:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)  # Python, too, passes over a finder that has none
            if finder is self or find_spec is None:
                continue
            spec: importlib.machinery.ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, _SWITCHES[fullname])
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, stock: importlib.abc.Loader, adapter: str) -> None:
        self._stock, self._adapter = stock, adapter

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._stock.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # the module never sees this loader
            module.__spec__.loader = module.__loader__ = self._stock
        self._stock.exec_module(module)
        try:
            importlib.import_module(self._adapter).switch_on()
        except Exception as error:  # it must not break the import of a framework
            logger.warning("fastft: cannot be switched on, training stays stock (%s)", error)
