"""The mapping in which a packed row leaves the collator."""

from __future__ import annotations

from typing import Any

import torch


class PackedBatch(dict[str, Any]):
    """A dict that loops may treat as the `BatchEncoding` of transformers: ``batch.to(device)``, ``batch.input_ids``."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """Move everything that can move, in place as `BatchEncoding` does; returns the batch itself."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"this packed batch has no '{name}'; it has {', '.join(self)}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this packed batch has no '{name}'; it has {', '.join(self)}") from None
