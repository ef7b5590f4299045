"""Makes the trainer you already have train faster, with the stock model and nothing left behind."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft_hf import FastFTCallback
    from fastft_lightning import FastFTPlugin
    from fastft_plugins.blocks import apply
    from fastft_plugins.config import FastFTConfig
    from fastft_plugins.errors import FastFTConfigError, FastFTError
    from fastft_plugins.hookspecs import hookimpl

__version__ = "0.1.0"
__all__ = [
    "FastFTCallback",
    "FastFTConfig",
    "FastFTConfigError",
    "FastFTError",
    "FastFTPlugin",
    "apply",
    "hookimpl",
    "hookspecs",
]

# Names are imported when first used: importing this package must cost nothing and pull in no framework.
_HOMES = {
    "FastFTConfig": "fastft_plugins.config",
    "FastFTError": "fastft_plugins.errors",
    "FastFTConfigError": "fastft_plugins.errors",
    "hookimpl": "fastft_plugins.hookspecs",
    "apply": "fastft_plugins.blocks",
}
# Name: its package, the frameworks of which one must be installed, the extra that installs them.
_ADAPTERS = {
    "FastFTCallback": ("fastft_hf", ("transformers",), "hf"),
    "FastFTPlugin": ("fastft_lightning", ("lightning", "pytorch_lightning"), "lightning"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "hookspecs":
        return importlib.import_module("fastft_plugins.hookspecs")
    if name in _ADAPTERS:
        module, frameworks, extra = _ADAPTERS[name]
        if not any(map(importlib.util.find_spec, frameworks)):
            raise ImportError(f"{name} needs '{frameworks[0]}': pip install 'fastft-plugins[{extra}]'")
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'fastft_plugins' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
