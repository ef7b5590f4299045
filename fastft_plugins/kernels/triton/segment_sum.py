"""Sums of the rows of each segment in fp32 and in a fixed order: the bias gradients of experts.

First every tile of rows is summed, then the tiles of each segment are. Autograd's backward of a gathered bias adds its
duplicates in bf16 instead: 41 % relative error at 16k rows an expert.

Shape suffixes: S sorted rows, E segments, N row width, P tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_plugins.kernels.rows import Rows
from fastft_plugins.kernels.triton.launch import launch
from fastft_plugins.kernels.triton.segments import find_tile
from fastft_plugins.kernels.triton_support import cdiv, next_power_of_2

_ROWS = 256  # of one tile


def segment_sum(rows: Rows, offsets_E: Tensor, weights_S: Tensor | None) -> Tensor:
    """See `fastft_plugins.kernels.rows.segment_sum`."""
    rows_XN, slot_S = rows.source_XH, rows.slot_S
    size, width, segments = rows.size, rows_XN.shape[1], offsets_E.numel()
    tiles = cdiv(size, _ROWS) + segments
    partial_PN = torch.empty((tiles, width), dtype=torch.float32, device=rows_XN.device)
    out_EN = torch.empty((segments, width), dtype=torch.float32, device=rows_XN.device)
    columns, padded = min(128, next_power_of_2(width)), next_power_of_2(segments)
    blocks = cdiv(width, columns)
    launch(
        _sum_rows, (blocks * tiles, 1, 1),
        rows_XN, slot_S, weights_S, offsets_E, partial_PN, width, segments, rows_XN.stride(0),
        INDEXED=slot_S is not None, TOP_K=rows.top_k, WEIGHTED=weights_S is not None, SEGMENTS=padded, ROWS=_ROWS,
        STEP=32, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    launch(
        _sum_tiles, (blocks, segments, 1),
        partial_PN, offsets_E, out_EN, width, segments,
        SEGMENTS=padded, ROWS=_ROWS, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out_EN


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _sum_rows(
    rows_ptr, slot_ptr, weights_ptr, offsets_ptr, partial_ptr, width, segments, stride,
    INDEXED: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = (width + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // blocks  # one axis for both: the others end at 65,535
    segment, first, end = find_tile(offsets_ptr, segments, tile, SEGMENTS, ROWS)
    if segment < 0:
        return
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for start in range(first, min(first + ROWS, end), STEP):
        row = start + tl.arange(0, STEP)
        real = row < end
        source = row.to(tl.int64)
        if INDEXED:
            source = (tl.load(slot_ptr + row, mask=real, other=0) // TOP_K).to(tl.int64)
        inside = real[:, None] & (columns[None, :] < width)
        value = tl.load(rows_ptr + source[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + row, mask=real, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(partial_ptr + tile.to(tl.int64) * width + columns, tl.sum(total, 0), mask=columns < width)


@triton.jit
def _sum_tiles(
    partial_ptr, offsets_ptr, out_ptr, width, segments,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    lanes = tl.arange(0, SEGMENTS)
    starts = tl.load(offsets_ptr + lanes - 1, mask=(lanes > 0) & (lanes < segments), other=0)
    ends = tl.load(offsets_ptr + lanes, mask=lanes < segments, other=0)
    tiles = tl.where(lanes < segments, (ends - starts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(lanes < segment, tiles, 0), 0)
    last = tl.sum(tl.where(lanes <= segment, tiles, 0), 0)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for tile in range(first, last):
        total += tl.load(partial_ptr + tl.cast(tile, tl.int64) * width + columns, mask=columns < width, other=0.0)
    tl.store(out_ptr + tl.cast(segment, tl.int64) * width + columns, total, mask=columns < width)
