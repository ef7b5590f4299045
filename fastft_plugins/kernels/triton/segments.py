"""Tiles over segments, found on the device: which rows of which segment a program works on.

A grid of cdiv(rows, ROWS) + segments programs covers every distribution of the rows over the segments, so that the host
need not know the distribution; the spare programs find nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(offsets_ptr, segments, tile, SEGMENTS: tl.constexpr, ROWS: tl.constexpr):
    """The segment of ``tile``, its first row and the segment's end; the segment is -1 for a spare tile.

    ``offsets`` holds the inclusive ends of the segments; ``SEGMENTS`` is a power of two, at least ``segments``.
    """
    lanes = tl.arange(0, SEGMENTS)
    starts = tl.load(offsets_ptr + lanes - 1, mask=(lanes > 0) & (lanes < segments), other=0)
    ends = tl.load(offsets_ptr + lanes, mask=lanes < segments, other=0)
    tiles = tl.where(lanes < segments, (ends - starts + ROWS - 1) // ROWS, 0)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    segment = tl.sum(tl.where(mine, lanes + 1, 0), 0) - 1
    first = tl.sum(tl.where(mine, starts + (tile - before) * ROWS, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return segment, first, end
