"""What every layer needs to know of a packed row, computed once, on the host."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastft_plugins.kernels import segments
from fastft_plugins.kernels.transfer import upload


@dataclass(frozen=True, eq=False)
class PackedMetadata:
    """The documents of one packed row of T tokens.

    Attributes:
        lengths: tokens of each of the N documents; on the host, so that no kernel launch waits for them.
        cu_seqlens: int32 ``[N + 1]``, where each document starts, and T.
        max_seqlen: tokens of the longest document.
        position_ids: int64 ``[T]``, restarting at 0 in every document.
        seq_idx: int32 ``[T]``, the document of each token.
        padded_tokens: tokens of the padded batch this row replaced (T if there was none).
        dropped_labels: labels the padded run would have trained from a padding position (left padding only).
        moved_positions: a document starts at another position than it had in the padded batch (left padding only).
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    seq_idx: Tensor
    padded_tokens: int = 0
    dropped_labels: int = 0
    moved_positions: bool = False

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        *,
        padded_tokens: int | None = None,
        dropped_labels: int = 0,
        moved_positions: bool = False,
    ) -> PackedMetadata:
        """Raises ValueError if there is no document or one without tokens, TypeError if a length is no integer."""
        lengths = tuple(operator.index(length) for length in lengths)
        if not lengths:
            raise ValueError("lengths: is empty; a packed row needs at least one document")
        if min(lengths) < 1:
            at = next(index for index, length in enumerate(lengths) if length < 1)
            raise ValueError(
                f"lengths[{at}]: is {lengths[at]}; every document needs at least one token, drop empty ones"
            )
        total = sum(lengths)
        if total >= 2**31:
            raise ValueError(f"lengths: sum to {total}; a packed row holds fewer than 2**31 tokens")
        return cls(
            lengths=lengths,
            cu_seqlens=segments.offsets(lengths),
            max_seqlen=max(lengths),
            position_ids=segments.positions(lengths),
            seq_idx=segments.segment_ids(lengths),
            padded_tokens=total if padded_tokens is None else padded_tokens,
            dropped_labels=dropped_labels,
            moved_positions=moved_positions,
        )

    @property
    def total_tokens(self) -> int:
        """T."""
        return int(self.position_ids.shape[0])

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedMetadata:
        """A copy with its tensors on ``device``, or itself if they are there already; the lengths stay on the host.

        Args:
            non_blocking: not needed. On the way to a GPU the host never waits, see `fastft_plugins.kernels.transfer`;
                on the way back it always does.
        """
        tensors = (self.cu_seqlens, self.position_ids, self.seq_idx)
        cu_seqlens, position_ids, seq_idx = moved = upload(tensors, torch.device(device))
        # Hooks of accelerate move the arguments of every layer, and what is made once a batch is found by identity.
        if all(map(operator.is_, moved, tensors)):
            return self
        return replace(self, cu_seqlens=cu_seqlens, position_ids=position_ids, seq_idx=seq_idx)

    def pin_memory(self) -> PackedMetadata:
        """A copy in page-locked host memory; a `DataLoader` with ``pin_memory=True`` calls this."""
        return replace(
            self,
            cu_seqlens=self.cu_seqlens.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            seq_idx=self.seq_idx.pin_memory(),
        )


@dataclass(frozen=True, eq=False)
class NotPacked:
    """Travels in place of the metadata with a batch that stays as the collator made it, and says why."""

    reason: str

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> NotPacked:
        return self

    def pin_memory(self) -> NotPacked:
        return self
