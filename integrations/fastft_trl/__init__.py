"""The adapter for TRL: its configs with a ``fastft`` flag, which TRL's stock trainers obey.

Importing this changes nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft_trl.configs import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig
    from fastft_trl.flag import report_of

__all__ = ["DPOConfig", "GRPOConfig", "KTOConfig", "RewardConfig", "SFTConfig", "report_of"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        if importlib.util.find_spec("trl") is None:
            raise ImportError(f"{name} needs 'trl': pip install 'fastft-plugins[trl]'")
        home = "fastft_trl.flag" if name == "report_of" else "fastft_trl.configs"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'fastft_trl' has no attribute '{name}'")
