"""Loads compiled kernels, describes tensors to the tensor memory accelerator, and launches, through CUDA's driver."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ELEMENTS = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128_BYTES, _PROMOTE_256_BYTES = 3, 3
_MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute
_MAP_BYTES = 128


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_driver(), function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{function} failed: {(name.value or b'unknown error').decode()} ({status})")


def load_kernel(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """A kernel for the current device, which may use ``shared_bytes`` of shared memory. It is never unloaded.

    The thread must have worked on the device before: what torch does first there gives the thread its CUDA context.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), cubin)
    _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
    return function


class TensorMap:
    """What TMA must know of a tensor, where the driver wants it: see `tensor_map`."""

    def __init__(self) -> None:
        # cuda-bindings has a class for this, but its memory is not aligned as the driver demands.
        self._memory = ctypes.create_string_buffer(2 * _MAP_BYTES)
        self.address = -(-ctypes.addressof(self._memory) // _MAP_BYTES) * _MAP_BYTES


def tensor_map(tensor: Tensor, box: tuple[int, int]) -> TensorMap:
    """A 2-byte tensor as TMA sees it, in boxes swizzled by 128 bytes. Outside of it, a box is filled with zeros.

    Args:
        tensor: ``[rows, columns]`` or ``[matrices, rows, columns]``; columns are contiguous, the address and the other
            strides are multiples of 16 bytes.
        box: rows and columns that one copy takes, 64 columns at most.

    As for `load_kernel`, torch must have worked on the device in this thread.
    """
    if tensor.dim() == 2:
        tensor = tensor[None]
    matrix_stride, row_stride, _ = tensor.stride()
    strides = (row_stride * 2, max(matrix_stride, row_stride) * 2)
    return _encoded(tensor.data_ptr(), _ELEMENTS[tensor.dtype], tuple(reversed(tensor.shape)), strides, box)


@functools.lru_cache(maxsize=4096)  # weights stay where they are, and activations come back to the same addresses
def _encoded(
    pointer: int, elements: int, sizes: tuple[int, ...], strides: tuple[int, int], box: tuple[int, int]
) -> TensorMap:
    result = TensorMap()
    _call(
        "cuTensorMapEncodeTiled", ctypes.c_void_p(result.address), elements, 3, ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 3)(*sizes), (ctypes.c_uint64 * 2)(*strides), (ctypes.c_uint32 * 3)(box[1], box[0], 1),
        (ctypes.c_uint32 * 3)(1, 1, 1), 0, _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, 0,
    )  # fmt: skip
    return result


def launch(
    kernel: ctypes.c_void_p, blocks: int, threads: int, shared_bytes: int,
    arguments: Sequence[TensorMap | Tensor | int],
) -> None:  # fmt: skip
    """Start a kernel on torch's current stream. An int is passed as 32 bits, a tensor as the address of its numbers.

    As for `load_kernel`, torch must have worked on the device in this thread.
    """
    values = [_as_driver_takes(argument) for argument in arguments]
    addresses = [value.address if isinstance(value, TensorMap) else ctypes.addressof(value) for value in values]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    _call("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, None)


def _as_driver_takes(argument: TensorMap | Tensor | int) -> TensorMap | ctypes.c_void_p | ctypes.c_int:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument if isinstance(argument, TensorMap) else ctypes.c_int(argument)
