"""The switch for ``Trainer(plugins=[...])``.

Of the kinds of plugin that Lightning accepts, each changes something the user may have chosen: the precision, the
checkpoint format, the cluster. Only the slot for layer synchronisation (batch norm) is free in a language model's
training, so `FastFTPlugin` takes that one, does nothing in it, and brings a callback along that does the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from fastft_lightning import namespaces
from fastft_lightning.callback import FastFTLightningCallback
from fastft_plugins.config import FastFTConfig
from fastft_plugins.errors import FastFTError
from fastft_plugins.report import Report


class FastFTPlugin:
    """``lightning.Trainer(..., plugins=[FastFTPlugin()])``, with any precision and strategy, in both namespaces.

    Args:
        config: a `FastFTConfig`, or a dict of its fields.

    Attributes:
        callback: the `FastFTLightningCallback` that the Trainer gets with this plugin.

    Raises:
        FastFTConfigError: at once, for a bad config.
        FastFTError: if this project is used without being installed, so that Lightning cannot find its callback.
    """

    def __init__(self, config: FastFTConfig | Mapping[str, Any] | None = None) -> None:
        _join_layer_sync()
        self.callback = FastFTLightningCallback(config)
        if not any(entry.value == namespaces.FACTORY for entry in entry_points(group=namespaces.FACTORY_GROUP)):
            raise FastFTError(
                "FastFTPlugin works through an entry point that is not installed here: pip install "
                "'fastft-plugins[lightning]', or pass callbacks=[FastFTLightningCallback()] of fastft_lightning"
            )

    @property
    def report(self) -> Report:
        """What was on in the last training, why, and what it saved."""
        return self.callback.report

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """The first thing that transformers' Trainer asks of a callback, which this is not one of: say what is."""
        raise FastFTError(
            "FastFTPlugin is the switch for lightning.Trainer(plugins=[...]); transformers' Trainer takes "
            "callbacks=[FastFTCallback()], from fastft_plugins"
        )

    def apply(self, model: Any) -> Any:
        """Part of the slot; there are no layers to synchronise."""
        return model

    def revert(self, model: Any) -> Any:
        """Part of the slot; there are no layers to synchronise."""
        return model


def _join_layer_sync() -> None:
    """Make `FastFTPlugin` a virtual subclass of the abstract `LayerSync` of every namespace in use."""
    for namespace in namespaces.loaded():
        namespace.plugins.LayerSync.register(FastFTPlugin)


_join_layer_sync()  # LightningCLI checks the class before it makes an instance
