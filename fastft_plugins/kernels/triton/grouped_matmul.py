"""Matrix products of sorted rows with their expert's weight, for cards where torch's grouped matmul is a loop.

The rows may be read through an index, so that nobody gathers them first. Programs are as many as the worst distribution
of rows over experts needs; each finds its expert from the offsets on the device, and the spare ones end at once.

Shape suffixes: S sorted rows, E experts, K inner width, N outer width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_plugins.kernels.rows import Rows
from fastft_plugins.kernels.triton.launch import launch
from fastft_plugins.kernels.triton.segments import find_tile
from fastft_plugins.kernels.triton_support import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tiles:
    """A tile of the result (``rows`` by ``columns``), the step along the inner width, and how it is scheduled."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


# (product of rows and weights, weight gradient), by compute capability. Shared memory is 227 KB on SM90 and SM100,
# 163 KB on SM80, and 99 KB on SM86, SM89 and SM120.
_LARGE = (Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 3))
_MEDIUM = (Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 3))
_SMALL = (Tiles(128, 128, 32, 8, 4), Tiles(128, 128, 32, 8, 4))
# Where a width is no multiple of 8, loads are narrow, and the addresses of a larger tile do not fit the registers.
_UNALIGNED = Tiles(64, 64, 32, 4, 3)


def tiles_for(capability: tuple[int, int]) -> tuple[Tiles, Tiles]:
    """The tiles of the product and of the weight gradient on a card of this compute capability."""
    if capability[0] in (9, 10):
        return _LARGE
    return _MEDIUM if capability == (8, 0) else _SMALL


@functools.cache
def _tiles_on(device: torch.device) -> tuple[Tiles, Tiles]:
    if device.type != "cuda":  # Triton's interpreter
        return Tiles(16, 32, 16, 1, 1), Tiles(16, 32, 16, 1, 1)
    return tiles_for(torch.cuda.get_device_capability(device))


def grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: Tensor | None = None) -> Tensor:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_matmul`."""
    rows_XK, slot_S = rows.source_XH, rows.slot_S
    size, (experts, inner, width) = rows.size, weight_EKN.shape
    accumulate = out_SN is not None
    if out_SN is None:
        out_SN = torch.empty((size, width), dtype=rows_XK.dtype, device=rows_XK.device)
    tiles = _suited(_tiles_on(rows_XK.device)[0], inner, width)
    if size and width:
        columns, step = _fitting(tiles.columns, width), _fitting(tiles.inner, inner)
        grid = (cdiv(width, columns) * (cdiv(size, tiles.rows) + experts), 1, 1)
        launch(
            _product, grid,
            rows_XK, slot_S, weight_EKN, out_SN, offsets_E, width, inner, experts,
            rows_XK.stride(0), *weight_EKN.stride(), out_SN.stride(0),
            INDEXED=slot_S is not None, TOP_K=rows.top_k, ACCUMULATE=accumulate, EXPERTS=next_power_of_2(experts),
            ROWS=tiles.rows, COLUMNS=columns, INNER=step, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out_SN


def grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_weight_grad`.

    The rows are gathered first: read through an index, the product was slower by a seventh on an H200.
    """
    rows_SK, grads_SN = rows.gathered(), grads.gathered()
    inner, width, experts = rows_SK.shape[1], grads_SN.shape[1], offsets_E.numel()
    out_EKN = torch.empty((experts, inner, width), dtype=rows_SK.dtype, device=rows_SK.device)
    tiles = _suited(_tiles_on(rows_SK.device)[1], inner, width)
    if out_EKN.numel():
        high, wide = _fitting(tiles.rows, inner), _fitting(tiles.columns, width)
        grid = (cdiv(inner, high) * cdiv(width, wide), experts, 1)
        launch(
            _weight_grad, grid,
            rows_SK, grads_SN, out_EKN, offsets_E, inner, width, rows_SK.stride(0), grads_SN.stride(0),
            HIGH=high, WIDE=wide, STEP=tiles.inner, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out_EKN


def _suited(tiles: Tiles, inner: int, width: int) -> Tiles:
    """The tiles, unless a side is too wide for one small tile and its loads are narrow. Strides are not looked at."""
    return _UNALIGNED if any(side > _UNALIGNED.columns and side % 8 for side in (inner, width)) else tiles


def _fitting(tile: int, width: int) -> int:
    """A tile no wider than needed: ranks of LoRA are far narrower than a tile. The tensor cores take 16 at least."""
    return min(tile, max(16, next_power_of_2(width)))


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _product(
    rows_ptr, slot_ptr, weight_ptr, out_ptr, offsets_ptr, width, inner, E,
    stride_row, stride_expert, stride_inner, stride_width, stride_out,
    INDEXED: tl.constexpr, TOP_K: tl.constexpr, ACCUMULATE: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    column_tiles = (width + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // column_tiles  # one axis for both: the others end at 65,535
    expert, first, end = find_tile(offsets_ptr, E, tile, EXPERTS, ROWS)
    if expert < 0:
        return
    row = first + tl.arange(0, ROWS)
    real = row < end
    source = row.to(tl.int64)
    if INDEXED:
        source = (tl.load(slot_ptr + row, mask=real, other=0) // TOP_K).to(tl.int64)
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, INNER)
    a_ptrs = rows_ptr + source[:, None] * stride_row + step[None, :]
    b_ptrs = weight_ptr + expert.to(tl.int64) * stride_expert
    b_ptrs += step[:, None].to(tl.int64) * stride_inner + column[None, :].to(tl.int64) * stride_width
    rows_inside, columns_inside = real[:, None], column[None, :] < width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    whole = inner // INNER * INNER
    for _ in range(0, whole, INNER):
        a = tl.load(a_ptrs, mask=rows_inside, other=0.0)
        b = tl.load(b_ptrs, mask=columns_inside, other=0.0)
        total = tl.dot(a, b, total)
        a_ptrs += INNER
        b_ptrs += INNER * stride_inner
    # Apart, because a mask that changes at every step takes a tenth of the speed, in the weight gradient a quarter;
    # and not before the loop, where it takes a third.
    if whole < inner:
        left = step < inner - whole
        a = tl.load(a_ptrs, mask=rows_inside & left[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=left[:, None] & columns_inside, other=0.0)
        total = tl.dot(a, b, total)
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * stride_out + column[None, :]
    inside = rows_inside & columns_inside
    if ACCUMULATE:
        total += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_grad(
    rows_ptr, grads_ptr, out_ptr, offsets_ptr, inner, width, stride_row, stride_grad,
    HIGH: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    wide_tiles = (width + WIDE - 1) // WIDE
    high = tl.program_id(0) // wide_tiles * HIGH + tl.arange(0, HIGH)
    wide = tl.program_id(0) % wide_tiles * WIDE + tl.arange(0, WIDE)
    high_inside, wide_inside = (high < inner)[None, :], (wide < width)[None, :]
    step = tl.arange(0, STEP)[:, None]
    a_ptrs = rows_ptr + (start + step).to(tl.int64) * stride_row + high[None, :]
    b_ptrs = grads_ptr + (start + step).to(tl.int64) * stride_grad + wide[None, :]
    total = tl.zeros((HIGH, WIDE), tl.float32)
    whole = (end - start) // STEP * STEP
    for _ in range(0, whole, STEP):
        a = tl.load(a_ptrs, mask=high_inside, other=0.0)
        b = tl.load(b_ptrs, mask=wide_inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total)
        a_ptrs += STEP * stride_row
        b_ptrs += STEP * stride_grad
    if whole < end - start:  # the last rows, without those of the next expert, which may be anything
        left = step < end - start - whole
        a = tl.load(a_ptrs, mask=left & high_inside, other=0.0)
        b = tl.load(b_ptrs, mask=left & wide_inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    out_ptrs = out_ptr + (expert.to(tl.int64) * inner + high[:, None]) * width + wide[None, :]
    inside = (high[:, None] < inner) & (wide[None, :] < width)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)
