"""Why a kernel cannot serve a grouped product, or should not because another one is faster."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastft_plugins.kernels.cuda.grouped_matmul import COLUMNS, cannot_run
from fastft_plugins.kernels.dispatch import not_on_nvidia
from fastft_plugins.kernels.grouped_matmul_torch import torch_is_right
from fastft_plugins.kernels.triton_support import TensorCall, triton_rejects

_NARROW = 64  # below this width a tile is mostly empty
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MatmulCall(TensorCall):
    """What decides which kernel can serve a product."""

    inner: int
    width: int
    dense: bool = True  # the weight lies in memory as [E, K, N] or as [E, N, K]
    aligned: bool = True  # each matrix and its rows start at a multiple of 16 bytes
    accumulate: bool = False


def cuda_rejects(call: MatmulCall) -> str | None:
    """Why it cannot serve this product or weight gradient, or is slower than others on an H200.

    Where its tiles fit (2880, 5760 columns) it is about 5 % faster than the others. Where those of 256 columns fit
    better, products were still 3 to 7 % faster with inner widths of 768 and 1536, at least 2 % slower with 4096 and
    more; a weight gradient of 1536 by 2048 was 2 to 7 % faster. Between 2048 and 4096 nothing was measured.
    """
    reason = not_on_nvidia(call.device)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(call.device) != (9, 0):
        return "is written for compute capability 9.0"
    if call.dtype not in _HALF:
        return f"needs bfloat16 or float16, got {call.dtype}"
    if not call.dense:
        return "needs a dense weight"
    reason = _widths_reject(call)
    if reason is None and _filled(call.width, COLUMNS) < 0.95 * _filled(call.width, 256):
        reason = f"wastes its tiles of {COLUMNS} columns on a width of {call.width}"
    if reason is None and call.width % COLUMNS and call.inner > 2048:
        reason = f"has tiles of {COLUMNS} columns, which fit a width of {call.width} worse than others"
    return reason or cannot_run(call.device, call.dtype)


def cuda_sums_reject(call: MatmulCall) -> str | None:
    reason = cuda_rejects(call)
    if reason is None and (call.inner % 64 or call.inner % 256 == 0):  # the sums take a row of a tile that is not full
        return f"needs an inner width in steps of 64, but not of 256, got {call.inner}"
    return reason


def tma_rejects(call: MatmulCall) -> str | None:
    reason = triton_rejects(call)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(call.device)[0] != 9:
        return "is tuned for compute capability 9.0"
    if call.dtype not in _HALF:
        return f"needs bfloat16 or float16, got {call.dtype}"
    if call.inner % 64 or not call.dense:
        return f"needs a dense weight, and an inner width in steps of 64, got {call.inner}"
    return _widths_reject(call)


def torch_rejects(call: MatmulCall) -> str | None:
    reason = not_on_nvidia(call.device)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(call.device)
    if capability[0] not in (9, 10):
        return f"is a loop that waits for the GPU at compute capability {capability[0]}.{capability[1]}"
    if call.dtype != torch.bfloat16:
        return f"is a loop that waits for the GPU in {call.dtype}"
    if not call.dense:
        return "needs a dense weight"
    reason = _widths_reject(call)
    if reason is None and not torch_is_right(call.device):
        return "gave wrong products here when probed"
    return reason


def triton_matmul_rejects(call: MatmulCall) -> str | None:
    if call.dtype == torch.float32:
        return "has no tensor cores for float32"
    return triton_rejects(call)


def _widths_reject(call: MatmulCall) -> str | None:
    if call.inner % 8 or call.width % 8:
        return f"needs widths that are multiples of 8, got {call.inner} and {call.width}"
    if not call.aligned:
        return "needs matrices and rows that start at a multiple of 16 bytes"
    if call.accumulate:
        return "cannot add to its output"
    narrowest = min(call.inner, call.width)
    return f"wastes its tiles on a width of {narrowest}" if narrowest < _NARROW else None


def _filled(width: int, columns: int) -> float:
    """The part of the tiles' columns that hold something."""
    return width / (-(-width // columns) * columns)
