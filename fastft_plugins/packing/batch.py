"""The mapping in which a packed row leaves the collator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft_plugins.kernels.transfer import upload
from fastft_plugins.packing.metadata import PackedMetadata


class PackedBatch(dict[str, Any]):
    """A dict that loops may treat as the `BatchEncoding` of transformers: ``batch.to(device)``, ``batch.input_ids``."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """Move everything that can move, in place as `BatchEncoding` does; returns the batch itself.

        On the way to a GPU the host never waits, whatever ``non_blocking`` says: trainers that leave it at False would
        wait once for each of the columns, and a packed row has more of them than a padded batch.
        """
        names = [name for name, value in self.items() if isinstance(value, Tensor)]
        for name, value in self.items():
            if name not in names and hasattr(value, "to"):
                self[name] = moved = value.to(device, non_blocking=non_blocking)
                if isinstance(moved, PackedMetadata):  # some columns are its own tensors, which are there now
                    own = {name: column for name, column in flash_columns(moved).items() if name in names}
                    self.update(own)
                    names = [name for name in names if name not in own]
        self.update(zip(names, upload([self[name] for name in names], torch.device(device)), strict=True))
        return self

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"this packed batch has no '{name}'; it has {', '.join(self)}")

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this packed batch has no '{name}'; it has {', '.join(self)}") from None


def flash_columns(metadata: PackedMetadata) -> dict[str, Any]:
    """What FlashAttention's path in transformers takes: ``cu_seq_lens``, ``max_length`` and ``seq_idx``, by keyword."""
    return {
        "cu_seq_lens_q": metadata.cu_seqlens,
        "cu_seq_lens_k": metadata.cu_seqlens,
        "max_length_q": metadata.max_seqlen,
        "max_length_k": metadata.max_seqlen,
        "seq_idx": metadata.seq_idx[None],
    }
