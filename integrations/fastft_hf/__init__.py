"""The adapter for transformers: `FastFTCallback` for its Trainer, and packed attention for its models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft_hf.callback import FastFTCallback

__all__ = ["FastFTCallback"]


def __getattr__(name: str) -> Any:
    if name == "FastFTCallback":
        from fastft_hf.callback import FastFTCallback

        return FastFTCallback
    raise AttributeError(f"module 'fastft_hf' has no attribute '{name}'")
