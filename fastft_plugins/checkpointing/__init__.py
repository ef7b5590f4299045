"""Activation checkpointing whose inputs wait in host memory, copied there and back beside the computation."""

from fastft_plugins.checkpointing.engine import OffloadCheckpoint

__all__ = ["OffloadCheckpoint"]
