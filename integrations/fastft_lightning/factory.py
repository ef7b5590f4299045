"""Lightning asks this entry point for callbacks whenever a Trainer is made; an error here would break them all."""

from __future__ import annotations

import logging
import sys
from typing import Any

from fastft_plugins import auto

logger = logging.getLogger("fastft")


def callbacks() -> list[Any]:
    """The callback of the `FastFTPlugin` in the ``plugins=`` of the Trainer being made.

    Any other Trainer gets none, unless FASTFT_AUTO=1 asks for one and it has none of its own.
    """
    if "fastft_lightning.marker" not in sys.modules and not auto.is_on():
        return []  # no FastFTPlugin was ever made
    trainer = _trainer_being_made()
    plugin = getattr(trainer.get("_accelerator_connector"), "_layer_sync", None)
    marker = sys.modules.get("fastft_lightning.marker")
    if marker is not None and isinstance(plugin, marker.FastFTPlugin):
        plugin.callback.speaks_for_run = auto.is_on()
        return [plugin.callback]
    return _automatic(trainer) if trainer and auto.is_on() else []


def _trainer_being_made() -> dict[str, Any]:
    """The attributes of the Trainer, which is ``self`` in a calling frame: the factory gets no arguments."""
    frame = sys._getframe(1)
    while frame is not None:
        # Through __dict__, because any object may be self in a calling frame, also one whose attributes have effects.
        attributes: Any = getattr(frame.f_locals.get("self"), "__dict__", {})
        if attributes.get("_accelerator_connector") is not None:
            return dict(attributes)
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def _automatic(trainer: dict[str, Any]) -> list[Any]:
    try:
        from fastft_lightning.auto import AutoLightningCallback
        from fastft_lightning.callback import FastFTLightningCallback
    except Exception as error:
        logger.warning("fastft: cannot be switched on, training stays stock (%s)", error)
        return []
    # Lightning extends the user's own list, so a second Trainer with it brings the first one's callback along.
    own = [callback for callback in trainer.get("callbacks", ()) if isinstance(callback, FastFTLightningCallback)]
    for callback in own:  # only the one whose run it is will speak
        callback.speaks_for_run = True
    return [] if own else [AutoLightningCallback()]
