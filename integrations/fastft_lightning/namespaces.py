"""Lightning exists twice: ``lightning.pytorch`` and ``pytorch_lightning`` hold the same classes, twice over."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

NAMES = ("lightning.pytorch", "pytorch_lightning")
# The entry point through which a Trainer gets its callback, and the group where Lightning looks for it.
FACTORY, FACTORY_GROUP = "fastft_lightning.factory:callbacks", "lightning.pytorch.callbacks_factory"


def loaded() -> list[ModuleType]:
    """The namespaces the program uses; if it has imported neither yet, the first that is installed.

    Raises:
        ImportError: with the pip command, if neither is installed.
    """
    modules = [sys.modules[name] for name in NAMES if name in sys.modules]
    if modules:
        return modules
    for name in NAMES:
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            return [importlib.import_module(name)]
    raise ImportError("fastft_lightning needs 'lightning': pip install 'fastft-plugins[lightning]'")
