"""The adapter for Lightning: `FastFTPlugin` for ``plugins=[...]``, or its callback for ``callbacks=[...]``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft_lightning.callback import FastFTLightningCallback
    from fastft_lightning.marker import FastFTPlugin

__all__ = ["FastFTLightningCallback", "FastFTPlugin"]

_HOMES = {"FastFTLightningCallback": "fastft_lightning.callback", "FastFTPlugin": "fastft_lightning.marker"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastft_lightning' has no attribute '{name}'")
