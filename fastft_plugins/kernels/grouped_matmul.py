"""Products of sorted rows with their expert's weight matrix, and the weight's gradient.

Shape suffixes: S sorted rows, E experts, K inner width, N outer width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastft_plugins.kernels.dispatch import Kernel, choose, not_on_nvidia
from fastft_plugins.kernels.rows import Rows
from fastft_plugins.kernels.triton_support import TensorCall, triton_kernel, triton_rejects

_NARROW = 64  # below this width a tile of torch's kernel is mostly empty


@dataclass(frozen=True)
class MatmulCall(TensorCall):
    """What decides which kernel can serve a product."""

    inner: int
    width: int
    dense: bool = True  # the weight lies in memory as [E, K, N] or as [E, N, K], from a multiple of 16 bytes on
    accumulate: bool = False


def grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: Tensor | None = None) -> Tensor:
    """Row s times the weight of its expert: ``[S, N]``; rows at or beyond ``offsets_E[-1]`` hold anything.

    Args:
        rows: ``[S, K]`` rows in expert order, or an index to them.
        weight_EKN: any strides; a transposed view costs nothing.
        offsets_E: int32, inclusive ends of the experts' rows.
        out_SN: if given, the product is added to it, and it is returned.
    """
    source = rows.source_XH
    _, inner, width = weight_EKN.shape
    dense = weight_EKN.is_contiguous() or weight_EKN.transpose(1, 2).is_contiguous()
    dense = dense and weight_EKN.data_ptr() % 16 == 0  # a view into a flat buffer of parameters may start anywhere
    call = MatmulCall(source.device, source.dtype, inner, width, dense, accumulate=out_SN is not None)
    product_SN: Tensor = choose("grouped_matmul", call).kernel.run(rows, weight_EKN, offsets_E, out_SN)
    return product_SN


def grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    """The sum over each expert's rows of rowᵀ · grad: ``[E, K, N]``, contiguous; 0 for an expert without rows."""
    source = rows.source_XH
    call = MatmulCall(source.device, source.dtype, source.shape[1], grads.source_XH.shape[1])
    out_EKN: Tensor = choose("grouped_weight_grad", call).kernel.run(rows, grads, offsets_E)
    return out_EKN


def _torch_grouped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    out: Tensor = function(a, b, offs=offsets_E)
    return out


def _torch_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: None) -> Tensor:
    return _torch_grouped_mm(rows.gathered(), weight_EKN, offsets_E)


def _torch_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    return _torch_grouped_mm(rows.gathered().t(), grads.gathered(), offsets_E)


def reference_grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: Tensor | None = None) -> Tensor:
    """Expert by expert. On a GPU the host waits for the offsets."""
    rows_SK = rows.gathered()
    if out_SN is None:
        out_SN = rows_SK.new_zeros((rows_SK.shape[0], weight_EKN.shape[2]))
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            out_SN[start:end] += rows_SK[start:end] @ weight_EKN[expert]
        start = end
    return out_SN


def reference_grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    """Expert by expert. On a GPU the host waits for the offsets."""
    rows_SK, grads_SN = rows.gathered(), grads.gathered()
    out_EKN = rows_SK.new_zeros((offsets_E.numel(), rows_SK.shape[1], grads_SN.shape[1]))
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(rows_SK[start:end].t(), grads_SN[start:end], out=out_EKN[expert])
        start = end
    return out_EKN


def _tma_rejects(call: MatmulCall) -> str | None:
    reason = triton_rejects(call)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(call.device)[0] != 9:
        return "is tuned for compute capability 9.0"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {call.dtype}"
    if call.inner % 8 or call.width % 8:
        return f"needs widths that are multiples of 8, got {call.inner} and {call.width}"
    return _too_narrow(call)


def _tma_product_rejects(call: MatmulCall) -> str | None:
    if call.inner % 64 or not call.dense:
        return f"needs a dense weight and an inner width in steps of 64, got {call.inner}"
    return _tma_rejects(call)


def _too_narrow(call: MatmulCall) -> str | None:
    if call.accumulate:
        return "cannot add to its output"
    narrowest = min(call.inner, call.width)
    return f"wastes its tiles on a width of {narrowest}" if narrowest < _NARROW else None


def _torch_rejects(call: MatmulCall) -> str | None:
    reason = not_on_nvidia(call.device)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(call.device)
    if capability[0] not in (9, 10):
        return f"is a loop that waits for the GPU at compute capability {capability[0]}.{capability[1]}"
    if call.dtype != torch.bfloat16:
        return f"is a loop that waits for the GPU in {call.dtype}"
    if call.inner % 8 or call.width % 8:
        return f"needs widths that are multiples of 8, got {call.inner} and {call.width}"
    if not call.dense:
        return "needs a dense weight that starts at a multiple of 16 bytes"
    if not _torch_is_right(call.device):
        return "gave wrong products here when probed"
    return _too_narrow(call)


@functools.cache
def _torch_is_right(device: torch.device) -> bool:
    """Compare a small product in each layout with a loop: a wrong result for transposed views was once reported.

    Source: https://github.com/pytorch/pytorch/issues/186365. Waits for the device, once.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows = Rows(torch.randn((96, 64), generator=generator, device=device).bfloat16())
    square_EKN = torch.randn((3, 64, 64), generator=generator, device=device).bfloat16()
    offsets_E = torch.tensor([33, 33, 96], dtype=torch.int32, device=device)
    pairs = [
        (_torch_matmul(rows, weight, offsets_E, None), reference_grouped_matmul(rows, weight, offsets_E))
        for weight in (square_EKN, square_EKN.transpose(1, 2))
    ]
    pairs.append((_torch_weight_grad(rows, rows, offsets_E), reference_grouped_weight_grad(rows, rows, offsets_E)))
    return all(torch.allclose(got, expected, rtol=0.02, atol=0.2) for got, expected in pairs)


def _triton_matmul_rejects(call: MatmulCall) -> str | None:
    if call.dtype == torch.float32:
        return "has no tensor cores for float32"
    return triton_rejects(call)


GROUPED_MATMUL_KERNELS = (
    Kernel("Triton with TMA", 0, _tma_product_rejects, triton_kernel("grouped_matmul_tma", "grouped_matmul")),
    Kernel("torch grouped_mm", 10, _torch_rejects, _torch_matmul),
    Kernel("Triton", 50, _triton_matmul_rejects, triton_kernel("grouped_matmul", "grouped_matmul")),
    Kernel("loop over experts", 100, lambda call: None, reference_grouped_matmul),
)
GROUPED_WEIGHT_GRAD_KERNELS = (
    Kernel("torch grouped_mm", 0, _torch_rejects, _torch_weight_grad),
    Kernel("Triton with TMA", 10, _tma_rejects, triton_kernel("grouped_matmul_tma", "grouped_weight_grad")),
    Kernel("Triton", 50, _triton_matmul_rejects, triton_kernel("grouped_matmul", "grouped_weight_grad")),
    Kernel("loop over experts", 100, lambda call: None, reference_grouped_weight_grad),
)
