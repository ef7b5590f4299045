"""Environment variables that are switches."""

from __future__ import annotations

import os


def is_set(variable: str) -> bool:
    """Whether a switch is on: not missing, empty, 0, false, no or off."""
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")
