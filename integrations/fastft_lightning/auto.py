"""The callback behind ``fastft run``: every Trainer of the process gets one, through the entry point in `factory`."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

from fastft_lightning.callback import FastFTLightningCallback
from fastft_lightning.namespaces import FACTORY, FACTORY_GROUP
from fastft_plugins import auto

logger = logging.getLogger("fastft")


class AutoLightningCallback(FastFTLightningCallback):
    """`FastFTLightningCallback` with the config of the environment."""

    def __init__(self) -> None:
        super().__init__(auto.config())
        self.speaks_for_run = True


def switch_on() -> None:
    """Lightning has been imported. The entry point does the rest, unless this project is used from a source tree."""
    if not any(entry.value == FACTORY for entry in entry_points(group=FACTORY_GROUP)):
        logger.warning(
            "fastft: stays off in Lightning, whose Trainer finds it through an entry point that is not installed "
            "here: pip install 'fastft-plugins[lightning]'"
        )
