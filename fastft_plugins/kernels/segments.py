"""Segments of a flat axis: the documents of a packed row, the rows of an expert. All results are CPU tensors.

Shape suffixes: N segments, T elements in all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def offsets(lengths: Sequence[int]) -> Tensor:
    """Start of every segment, and the end of the last: int32 ``[N + 1]``, the ``cu_seqlens`` of attention kernels."""
    starts_N1 = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=starts_N1[1:])
    return starts_N1


def segment_ids(lengths: Sequence[int]) -> Tensor:
    """Which segment each element belongs to: int32 ``[T]``."""
    ids_N = torch.arange(len(lengths), dtype=torch.int32)
    return torch.repeat_interleave(ids_N, torch.tensor(lengths))


def positions(lengths: Sequence[int]) -> Tensor:
    """Position of each element in its segment, from 0: int64 ``[T]``."""
    lengths_N = torch.tensor(lengths)
    starts_N = torch.cumsum(lengths_N, 0) - lengths_N
    return torch.arange(int(lengths_N.sum())) - torch.repeat_interleave(starts_N, lengths_N)


def lengths_of(starts_T: Tensor) -> list[int]:
    """Lengths of the segments that begin where the boolean ``[T]`` CPU tensor is true; element 0 begins one."""
    begins_N = torch.nonzero(starts_T).flatten()
    ends_N = torch.cat([begins_N[1:], torch.tensor([starts_T.numel()])])
    lengths: list[int] = (ends_N - begins_N).tolist()
    return lengths
