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
    # repeat_interleave and indexing wake all threads, however few the elements: 7 ms a batch on a host of 32 cores.
    starts_N1 = offsets(lengths)
    begun_T1 = torch.zeros(int(starts_N1[-1]) + 1, dtype=torch.int32)
    begun_T1.index_add_(0, starts_N1[1:], torch.ones(len(lengths), dtype=torch.int32))
    return begun_T1[:-1].cumsum(0, dtype=torch.int32)


def positions(lengths: Sequence[int]) -> Tensor:
    """Position of each element in its segment, from 0: int64 ``[T]``."""
    starts_N1 = offsets(lengths)
    return torch.arange(int(starts_N1[-1])) - starts_N1.index_select(0, segment_ids(lengths))


def lengths_of(starts_T: Tensor) -> list[int]:
    """Lengths of the segments that begin where the boolean ``[T]`` CPU tensor is true; element 0 begins one."""
    begins_N = torch.nonzero(starts_T).flatten()
    ends_N = torch.cat([begins_N[1:], torch.tensor([starts_T.numel()])])
    lengths: list[int] = (ends_N - begins_N).tolist()
    return lengths
