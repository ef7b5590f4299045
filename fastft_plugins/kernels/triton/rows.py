"""Kernels that move rows between token order and expert order. All sums are in fp32 and in a fixed order.

Shape suffixes: T tokens, K experts of a token, S = T·K routed rows, E experts, H row width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_plugins.kernels.rows import Rows
from fastft_plugins.kernels.triton.launch import launch
from fastft_plugins.kernels.triton_support import cdiv, next_power_of_2


def gather_rows(rows: Rows) -> Tensor:
    """See `fastft_plugins.kernels.rows.gather_rows`."""
    source_TH, size, width = rows.source_XH, rows.size, rows.source_XH.shape[1]
    out_SH = torch.empty((size, width), dtype=source_TH.dtype, device=source_TH.device)
    if not out_SH.numel():
        return out_SH
    columns = min(next_power_of_2(width), 512)
    if rows.inverse_XK is not None:
        high, tokens = 2048 // columns, source_TH.shape[0]
        grid = (cdiv(tokens, high), cdiv(width, columns), 1)
        launch(_spread, grid, source_TH, rows.inverse_XK, out_SH, tokens, width, source_TH.stride(0), K=rows.top_k,
               ROWS=high, COLUMNS=columns, num_warps=4)  # fmt: skip
    else:
        high = 4096 // columns
        grid = (cdiv(size, high), cdiv(width, columns), 1)
        launch(_gather, grid, source_TH, rows.slot_S, out_SH, size, width, source_TH.stride(0), K=rows.top_k,
               ROWS=high, COLUMNS=columns, num_warps=4)  # fmt: skip
    return out_SH


def combine_rows(
    rows_SH: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    bias_EH: Tensor | None,
    ids_TK: Tensor | None,
) -> Tensor:
    """See `fastft_plugins.kernels.rows.combine_rows`."""
    tokens, top_k = inverse_TK.shape
    width = rows_SH.shape[1]
    out_TH = torch.empty((tokens, width), dtype=rows_SH.dtype, device=rows_SH.device)
    bias_EH = None if bias_EH is None else bias_EH.contiguous()
    if out_TH.numel():
        columns = min(next_power_of_2(width), 1024)
        rows = max(1, 2048 // columns)
        grid = (cdiv(tokens, rows), cdiv(width, columns), 1)
        launch(
            _combine, grid,
            rows_SH, inverse_TK, offsets_E, weights_TK, bias_EH, ids_TK, out_TH, tokens, width, offsets_E.numel(),
            K=top_k, WEIGHTED=weights_TK is not None, BIAS=bias_EH is not None, ROWS=rows, COLUMNS=columns,
            num_warps=4,
        )  # fmt: skip
    return out_TH


# Arguments that differ from batch to batch must not be specialised: each new kind of number would be a new compilation.
@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["slot_ptr"])
def _gather(
    source_ptr, slot_ptr, out_ptr, size, width, stride,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < size) & (columns[None, :] < width)
    source = (tl.load(slot_ptr + rows, mask=rows < size, other=0) // K).to(tl.int64)
    values = tl.load(source_ptr + source[:, None] * stride + columns[None, :], mask=inside)
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _spread(
    source_ptr, inverse_ptr, out_ptr, tokens, width, stride,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token[:, None] < tokens) & (columns[None, :] < width)
    values = tl.load(source_ptr + token[:, None] * stride + columns[None, :], mask=inside)
    for k in tl.static_range(K):
        row = tl.load(inverse_ptr + token * K + k, mask=token < tokens, other=0).to(tl.int64)
        tl.store(out_ptr + row[:, None] * width + columns[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    rows_ptr, inverse_ptr, offsets_ptr, weights_ptr, bias_ptr, ids_ptr, out_ptr, tokens, width, E,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = token < tokens
    routed = tl.load(offsets_ptr + E - 1)  # rows beyond belong to sentinels and hold anything
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse_ptr + token * K + k, mask=real, other=0).to(tl.int64)
        used = real & (row < routed)
        inside = used[:, None] & (columns[None, :] < width)
        value = tl.load(rows_ptr + row[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            expert = tl.load(ids_ptr + token * K + k, mask=used, other=0).to(tl.int64)
            value += tl.load(bias_ptr + expert[:, None] * width + columns[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        if WEIGHTED:
            value *= tl.load(weights_ptr + token * K + k, mask=used, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(
        out_ptr + token[:, None] * width + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (columns[None, :] < width),
    )
