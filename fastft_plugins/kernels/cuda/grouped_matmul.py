"""Products of sorted rows with their expert's weight on Hopper, in CUDA C++.

On an H200, whose power limit all of these run into, the six products of gpt-oss-20b's experts (forward, backward and
weight gradients, 131,072 rows) take 30.2 ms with this kernel and 31.8 ms with the better one of torch's and Triton's
for each; cuBLAS, were all experts equally long, would take 29.1 ms.

Shape suffixes: S sorted rows, E experts, K inner width, N outer width.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.resources import files

import torch
from torch import Tensor

from fastft_plugins.kernels.cuda.compiler import compile_cuda
from fastft_plugins.kernels.cuda.driver import TensorMap, launch, load_kernel, tensor_map
from fastft_plugins.kernels.rows import Rows

COLUMNS = 192  # of a tile, see grouped_matmul.cu, as for the next three
_STAGES, _BLOCK, _THREADS = 4, 64, 384
_SHARED_BYTES = 1024 + _STAGES * (256 + COLUMNS) * _BLOCK * 2 + _STAGES * (8 + 8 + 4)
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_PER_ROW_OF_WEIGHTS = 8  # TMA reads 16 bytes at least


def grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: None = None) -> Tensor:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_matmul`. Widths must be multiples of 8."""
    rows_SK = rows.gathered()
    size, (experts, inner, width) = rows_SK.shape[0], weight_EKN.shape
    product_SN = torch.empty((size, width), dtype=rows_SK.dtype, device=rows_SK.device)
    if size:
        along_n = weight_EKN.stride(2) == 1
        matrices, box = (weight_EKN, (_BLOCK, _BLOCK)) if along_n else (weight_EKN.transpose(1, 2), (COLUMNS, _BLOCK))
        a, b = tensor_map(rows_SK, (_BLOCK, _BLOCK)), tensor_map(matrices, box)
        _run(rows_SK, False, along_n, False, a, b, a, product_SN, product_SN, offsets_E, experts, 0, width, inner)
    return product_SN


def grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_weight_grad`. Widths must be multiples of 8."""
    return _weight_grad(rows, grads, offsets_E, None)[0]


def grouped_weight_bias_grad(
    rows: Rows, grads: Rows, offsets_E: Tensor, weights_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_weight_bias_grad`. The rows' width must be a multiple of 64.

    The weights of the rows are one more column of the rows, so that the sum is one more row of the weight's gradient.
    It costs next to nothing where that row fits into a tile which is not full.
    """
    sample_SK = rows.source_XH
    size = grads.source_XH.shape[0] if grads.index_S is None else grads.index_S.shape[0]
    if weights_S is None:
        weights_S8 = torch.ones((size, _PER_ROW_OF_WEIGHTS), dtype=sample_SK.dtype, device=sample_SK.device)
    else:
        weights_S8 = weights_S.to(sample_SK.dtype)[:, None].expand(-1, _PER_ROW_OF_WEIGHTS).contiguous()
    return _weight_grad(rows, grads, offsets_E, weights_S8)


def _weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor, weights_S8: Tensor | None) -> tuple[Tensor, Tensor]:
    rows_SK, grads_SN = rows.gathered(), grads.gathered()
    experts, inner, width = offsets_E.numel(), rows_SK.shape[1], grads_SN.shape[1]
    make = torch.empty if rows_SK.shape[0] else torch.zeros
    out_EKN = make((experts, inner, width), dtype=rows_SK.dtype, device=rows_SK.device)
    sums_EN = make((experts, width), dtype=rows_SK.dtype, device=rows_SK.device) if weights_S8 is not None else out_EKN
    if rows_SK.shape[0]:
        a, b = (tensor_map(tensor, (_BLOCK, _BLOCK)) for tensor in (rows_SK, grads_SN))
        weights = a if weights_S8 is None else tensor_map(weights_S8, (_BLOCK, _BLOCK))
        _run(
            rows_SK, True, True, weights_S8 is not None, a, b, weights, out_EKN, sums_EN, offsets_E, experts, inner,
            width, 0,
        )  # fmt: skip
    return out_EKN, sums_EN


def _run(
    rows_SK: Tensor, weight_grad: bool, along_n: bool, sums: bool, a: TensorMap, b: TensorMap, weights: TensorMap,
    out: Tensor, sums_EN: Tensor, offsets_E: Tensor, *sizes: int,
) -> None:  # fmt: skip
    device = rows_SK.device
    next_tile = torch.zeros(1, dtype=torch.int32, device=device)  # first: it gives a new thread its CUDA context
    kernel = _kernel(device, weight_grad, along_n, sums, _DTYPES[rows_SK.dtype])
    arguments: list[TensorMap | Tensor | int] = [a, b, weights, out, sums_EN, next_tile, offsets_E, *sizes]
    launch(kernel, _multiprocessors(device), _THREADS, _SHARED_BYTES, arguments)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(device: torch.device, weight_grad: bool, along_n: bool, sums: bool, dtype: str) -> ctypes.c_void_p:
    return load_kernel(compile_variant(weight_grad, along_n, sums, dtype), "grouped_matmul", _SHARED_BYTES)


@functools.cache
def compile_variant(weight_grad: bool, along_n: bool, sums: bool, dtype: str) -> bytes:
    """The machine code of one variant of the kernel; 0.4 s. ``dtype`` is bf16 or f16."""
    flags = {"WEIGHT_GRAD": weight_grad, "B_ALONG_N": along_n, "SUMS": sums}
    head = "".join(f"constexpr bool {name} = {str(value).lower()};\n" for name, value in flags.items())
    head += f'#define DTYPE "{dtype}"\n{_wgmma(dtype, weight_grad, along_n)}'
    source = (files(__package__) / "grouped_matmul.cu").read_text()
    return compile_cuda(f"{head}#line 1\n{source}", "grouped_matmul.cu", "sm_90a")


def _wgmma(dtype: str, a_along_m: bool, b_along_n: bool) -> str:
    """The function that multiplies a block of 64 rows, 16 steps of k: its instruction names every sum by itself."""
    count = COLUMNS // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return (
        "typedef unsigned long long u64;\n"
        f"__device__ __forceinline__ void wgmma(float (&sums)[{count}], u64 a, u64 b) {{\n"
        f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.{dtype}.{dtype} {{{registers}}}, '
        f'%{count}, %{count + 1}, 1, 1, 1, {int(a_along_m)}, {int(b_along_n)};"\n'
        f'                 : {operands} : "l"(a), "l"(b));\n}}\n'
    )
