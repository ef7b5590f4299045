"""Products of sorted rows with their expert's weight on Hopper, in CUDA C++.

On an H200, whose power limit all of these run into, the six products of gpt-oss-20b's experts (forward, backward and
weight gradients, 131,072 rows) take 1.02 to 1.14 times what cuBLAS would take were all experts equally long, and 6 to
7 % less than the best of torch's and Triton's kernels for each (`benchmarks.grouped_products`, five runs).

Shape suffixes: S sorted rows, E experts, K inner width, N outer width.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from importlib.resources import files

import torch
from torch import Tensor

from fastft_plugins.kernels.cuda.compiler import compile_cuda
from fastft_plugins.kernels.cuda.driver import launch, load_kernel, ready_stream, set_to_zero, tensor_map
from fastft_plugins.kernels.rows import Rows
from fastft_plugins.kernels.triton_support import multiprocessors

COLUMNS = 192  # of a tile, see grouped_matmul.cu, as for the next three
_STAGES, _BLOCK, _THREADS = 4, 64, 384
_SHARED_BYTES = 1024 + _STAGES * (256 + COLUMNS) * _BLOCK * 2 + _STAGES * (8 + 8 + 4)
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_BOX = (_BLOCK, _BLOCK)
# The kernel's arguments: three tensor maps of 128 bytes, then these pointers and sizes; and where each begins.
_NUMBERS = struct.Struct("4P4i")
_STARTS = (0, 128, 256, 384, 392, 400, 408, 416, 420, 424, 428)
_WEIGHTS_OF_ROW = 8  # of which one counts: rows of a tensor map lie a multiple of 16 bytes apart


def grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: None = None) -> Tensor:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_matmul`. Widths must be multiples of 8."""
    rows_SK = rows.gathered()
    size, (experts, inner, width) = rows_SK.shape[0], weight_EKN.shape
    product_SN = torch.empty((size, width), dtype=rows_SK.dtype, device=rows_SK.device)
    if size:
        stream, along_n = ready_stream(rows_SK.device), weight_EKN.stride(2) == 1
        a = tensor_map(rows_SK, _BOX)
        b = tensor_map(weight_EKN, _BOX) if along_n else tensor_map(weight_EKN.mT, (COLUMNS, _BLOCK))
        maps, sizes = a + b + a, (experts, 0, width, inner)  # the third map is not read
        _run(stream, (False, along_n, False), maps, product_SN, product_SN, offsets_E, sizes)
    return product_SN


def grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_weight_grad`. Widths must be multiples of 8."""
    return _weight_grad(rows, grads, offsets_E, None)[0]


def grouped_weight_bias_grad(
    rows: Rows, grads: Rows, offsets_E: Tensor, weights_S: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `fastft_plugins.kernels.grouped_matmul.grouped_weight_bias_grad`. The rows' width must be a multiple of 64.

    The weights of the rows, in the dtype of the rows, are one more column of the rows, so that the sum is one more row
    of the weight's gradient. It costs next to nothing where that row fits into a tile which is not full.
    """
    source_XK = rows.source_XH
    if weights_S is None:
        weights_S8 = torch.ones((grads.size, _WEIGHTS_OF_ROW), dtype=source_XK.dtype, device=source_XK.device)
    else:
        weights_S8 = weights_S.to(source_XK.dtype)[:, None].expand(-1, _WEIGHTS_OF_ROW).contiguous()
    return _weight_grad(rows, grads, offsets_E, weights_S8)


def _weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor, weights_S8: Tensor | None) -> tuple[Tensor, Tensor]:
    rows_SK, grads_SN = rows.gathered(), grads.gathered()
    experts, inner, width = offsets_E.numel(), rows_SK.shape[1], grads_SN.shape[1]
    make = torch.empty if rows_SK.shape[0] else torch.zeros
    out_EKN = make((experts, inner, width), dtype=rows_SK.dtype, device=rows_SK.device)
    sums_EN = make((experts, width), dtype=rows_SK.dtype, device=rows_SK.device) if weights_S8 is not None else out_EKN
    if rows_SK.shape[0]:
        stream = ready_stream(rows_SK.device)
        a, b = tensor_map(rows_SK, _BOX), tensor_map(grads_SN, _BOX)
        weights = a if weights_S8 is None else tensor_map(weights_S8, _BOX)
        variant, sizes = (True, True, weights_S8 is not None), (experts, inner, width, 0)
        _run(stream, variant, a + b + weights, out_EKN, sums_EN, offsets_E, sizes)
    return out_EKN, sums_EN


def _run(
    stream: int, variant: tuple[bool, bool, bool], maps: bytes, out: Tensor, sums_EN: Tensor, offsets_E: Tensor,
    sizes: tuple[int, int, int, int],
) -> None:  # fmt: skip
    kernel = _kernel(out.device, *variant, _DTYPES[out.dtype])
    next_tile = torch.empty(1, dtype=torch.int32, device=out.device)
    set_to_zero(next_tile, stream)
    tensors = (out, sums_EN, next_tile, offsets_E)
    numbers = _NUMBERS.pack(*[tensor.data_ptr() for tensor in tensors], *sizes)
    launch(kernel, multiprocessors(out.device), _THREADS, _SHARED_BYTES, stream, maps + numbers, _STARTS)


@functools.cache
def cannot_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine cannot compile or load the kernel, or None. Compiles the variant that every training uses."""
    try:
        with torch.cuda.device(device):
            ready_stream(device)
            _kernel(device, False, True, False, _DTYPES[dtype])
    except Exception as error:  # a missing package or library, an old compiler, a driver older than the compiler
        return f"cannot be compiled or loaded here: {type(error).__name__}: {error}"
    return None


@functools.cache
def _kernel(device: torch.device, weight_grad: bool, along_n: bool, sums: bool, dtype: str) -> ctypes.c_void_p:
    return load_kernel(compile_variant(weight_grad, along_n, sums, dtype), "grouped_matmul", _SHARED_BYTES)


@functools.cache
def compile_variant(weight_grad: bool, along_n: bool, sums: bool, dtype: str) -> bytes:
    """The machine code of one variant of the kernel, in about a second. ``dtype`` is bf16 or f16."""
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
    # The last five: add to the sums, A and B as they are and not negated, A along m, B along n.
    return (
        "typedef unsigned long long u64;\n"
        f"__device__ __forceinline__ void wgmma(float (&sums)[{count}], u64 a, u64 b) {{\n"
        f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.{dtype}.{dtype} {{{registers}}}, '
        f'%{count}, %{count + 1}, 1, 1, 1, {int(a_along_m)}, {int(b_along_n)};"\n'
        f'                 : {operands} : "l"(a), "l"(b));\n}}\n'
    )
