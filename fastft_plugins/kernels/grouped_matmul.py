"""Products of sorted rows with their expert's weight matrix, and the weight's gradient.

Shape suffixes: S sorted rows, E experts, K inner width, N outer width.
"""

from __future__ import annotations

from torch import Tensor

from fastft_plugins.kernels import grouped_matmul_rejects as rejects
from fastft_plugins.kernels.dispatch import Kernel, choose
from fastft_plugins.kernels.grouped_matmul_reference import reference_grouped_matmul, reference_grouped_weight_grad
from fastft_plugins.kernels.grouped_matmul_rejects import MatmulCall
from fastft_plugins.kernels.grouped_matmul_torch import torch_grouped_matmul, torch_grouped_weight_grad
from fastft_plugins.kernels.rows import Rows, segment_sum
from fastft_plugins.kernels.triton_support import gpu_kernel, triton_kernel


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
    aligned = _aligned(rows) and weight_EKN.data_ptr() % 16 == 0  # a view into a flat buffer may start anywhere
    call = MatmulCall(source.device, source.dtype, inner, width, dense, aligned, accumulate=out_SN is not None)
    product_SN: Tensor = choose("grouped_matmul", call).kernel.run(rows, weight_EKN, offsets_E, out_SN)
    return product_SN


def grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    """The sum over each expert's rows of rowᵀ · grad: ``[E, K, N]``, contiguous; 0 for an expert without rows."""
    out_EKN: Tensor = choose("grouped_weight_grad", _grad_call(rows, grads)).kernel.run(rows, grads, offsets_E)
    return out_EKN


def grouped_weight_bias_grad(
    rows: Rows, grads: Rows, offsets_E: Tensor, weights_S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`grouped_weight_grad`, and the sum over each expert's rows of grad, times ``weights_S`` if given.

    Returns:
        ``[E, K, N]``, and ``[E, N]`` summed in fp32 (fp64 for fp64) and rounded to the dtype of ``grads`` or better, to
        which ``weights_S`` may be rounded before.
    """
    run = choose("grouped_weight_bias_grad", _grad_call(rows, grads)).kernel.run
    both: tuple[Tensor, Tensor] = run(rows, grads, offsets_E, weights_S)
    return both


def _grad_call(rows: Rows, grads: Rows) -> MatmulCall:
    source, width = rows.source_XH, grads.source_XH.shape[1]
    return MatmulCall(source.device, source.dtype, source.shape[1], width, aligned=_aligned(rows) and _aligned(grads))


def _aligned(rows: Rows) -> bool:
    """Whether each row starts at a multiple of 16 bytes once it has been gathered."""
    source = rows.source_XH
    if rows.slot_S is not None:
        return True
    row_bytes = source.stride(0) * source.element_size()
    apart = source.stride(0) >= source.shape[1]
    return apart and source.stride(1) == 1 and source.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def _separate_grads(rows: Rows, grads: Rows, offsets_E: Tensor, weights_S: Tensor | None) -> tuple[Tensor, Tensor]:
    return grouped_weight_grad(rows, grads, offsets_E), segment_sum(grads, offsets_E, weights_S)


GROUPED_MATMUL_KERNELS = (
    Kernel("CUDA for Hopper", 0, rejects.cuda_rejects, gpu_kernel("cuda.grouped_matmul", "grouped_matmul")),
    Kernel("Triton with TMA", 10, rejects.tma_rejects, triton_kernel("grouped_matmul_tma", "grouped_matmul")),
    Kernel("torch grouped_mm", 20, rejects.torch_rejects, torch_grouped_matmul),
    Kernel("Triton", 50, rejects.triton_matmul_rejects, triton_kernel("grouped_matmul", "grouped_matmul")),
    Kernel("loop over experts", 100, lambda call: None, reference_grouped_matmul),
)
GROUPED_WEIGHT_GRAD_KERNELS = (
    Kernel("CUDA for Hopper", 0, rejects.cuda_rejects, gpu_kernel("cuda.grouped_matmul", "grouped_weight_grad")),
    Kernel("torch grouped_mm", 10, rejects.torch_rejects, torch_grouped_weight_grad),
    Kernel("Triton", 50, rejects.triton_matmul_rejects, triton_kernel("grouped_matmul", "grouped_weight_grad")),
    Kernel("loop over experts", 100, lambda call: None, reference_grouped_weight_grad),
)
GROUPED_WEIGHT_BIAS_GRAD_KERNELS = (
    Kernel(
        "CUDA for Hopper", 0, rejects.cuda_sums_reject, gpu_kernel("cuda.grouped_matmul", "grouped_weight_bias_grad")
    ),
    Kernel("weight gradient, then sums", 100, lambda call: None, _separate_grads),
)
