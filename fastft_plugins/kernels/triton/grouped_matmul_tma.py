"""Products of sorted rows with their expert's weight on Hopper, fed by the tensor memory accelerator.

One program per multiprocessor walks over the tiles of all experts. On an H200 this runs at 590 to 750 TFLOP/s where
torch's grouped matmul runs at 500 to 670: the walk leaves no wave of tiles half empty, and neighbouring programs share
rows and weights in the L2 cache.

Shape suffixes: S sorted rows, E experts, K inner width, N outer width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastft_plugins.kernels.rows import Rows
from fastft_plugins.kernels.triton_support import multiprocessors, next_power_of_2

ROWS, COLUMNS, INNER = 128, 256, 64
_GROUP = 8  # tiles of rows that share a tile of the weight while it is in the L2 cache


def grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: None = None) -> Tensor:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_matmul`. K must be a multiple of `INNER`."""
    rows_SK = rows.gathered()
    size, (experts, inner, width) = rows_SK.shape[0], weight_EKN.shape
    out_SN = torch.empty((size, width), dtype=rows_SK.dtype, device=rows_SK.device)  # type: ignore[assignment]
    if size:
        transposed = weight_EKN.stride(2) != 1
        flat = weight_EKN.transpose(1, 2).reshape(-1, inner) if transposed else weight_EKN.reshape(-1, width)
        block = [COLUMNS, INNER] if transposed else [INNER, COLUMNS]
        programs = multiprocessors(rows_SK.device)
        _product[(programs,)](
            TensorDescriptor.from_tensor(rows_SK, [ROWS, INNER]), TensorDescriptor.from_tensor(flat, block),
            out_SN, offsets_E, width, inner, experts, TRANSPOSED=transposed,
            EXPERTS=next_power_of_2(experts), ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER, GROUP=_GROUP,
            PROGRAMS=programs, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out_SN  # type: ignore[return-value]


@triton.jit
def _product(
    rows_desc, weight_desc, out_ptr, offsets_ptr, width, inner, E,
    TRANSPOSED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, EXPERTS)
    starts = tl.load(offsets_ptr + lanes - 1, mask=(lanes > 0) & (lanes < E), other=0)
    ends = tl.load(offsets_ptr + lanes, mask=lanes < E, other=0)
    row_tiles = tl.where(lanes < E, (ends - starts + ROWS - 1) // ROWS, 0)
    column_tiles = (width + COLUMNS - 1) // COLUMNS
    after = tl.cumsum(row_tiles, 0) * column_tiles
    before = after - row_tiles * column_tiles
    for tile in tl.range(tl.program_id(0), tl.sum(row_tiles, 0) * column_tiles, PROGRAMS, flatten=True):
        mine = (before <= tile) & (tile < after)
        expert = tl.sum(tl.where(mine, lanes, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
        # Down the rows of a group first, so that a tile of the weight serves GROUP tiles of rows in a row.
        place = tile - tl.sum(tl.where(mine, before, 0), 0)
        top = place // (GROUP * column_tiles) * GROUP
        height = tl.minimum(tl.sum(tl.where(mine, row_tiles, 0), 0) - top, GROUP)
        place = place % (GROUP * column_tiles)
        row = tl.sum(tl.where(mine, starts, 0), 0) + (top + place % height) * ROWS
        column = place // height * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, inner, INNER):
            a = rows_desc.load([row, k])  # rows of the next expert come along; they are not stored
            if TRANSPOSED:
                total = tl.dot(a, weight_desc.load([expert * width + column, k]).T, total)
            else:
                total = tl.dot(a, weight_desc.load([expert * inner + k, column]), total)
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        tl.store(
            out_ptr + rows[:, None].to(tl.int64) * width + columns[None, :],
            total.to(out_ptr.dtype.element_ty),
            mask=(rows[:, None] < end) & (columns[None, :] < width),
        )
