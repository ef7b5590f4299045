"""Lightning asks this entry point for callbacks whenever a Trainer is made; an error here would break them all."""

from __future__ import annotations

import sys
from typing import Any


def callbacks() -> list[Any]:
    """The callback of the `FastFTPlugin` in the ``plugins=`` of the Trainer being made; for any other Trainer, none.

    Lightning calls the factory without arguments, but the Trainer is ``self`` in a calling frame.
    """
    marker = sys.modules.get("fastft_lightning.marker")
    if marker is None:  # then no FastFTPlugin was ever made
        return []
    frame = sys._getframe(1)
    while frame is not None:
        # Through __dict__, because any object may be self in a calling frame, also one whose attributes have effects.
        connector = getattr(frame.f_locals.get("self"), "__dict__", {}).get("_accelerator_connector")
        plugin = getattr(connector, "_layer_sync", None)
        if isinstance(plugin, marker.FastFTPlugin):
            return [plugin.callback]
        if connector is not None:
            return []
        frame = frame.f_back  # type: ignore[assignment]
    return []
