"""Loads compiled kernels, describes tensors to the tensor memory accelerator, and launches, through CUDA's driver.

`ready_stream` comes first, in each thread and for each device.
"""

from __future__ import annotations

import ctypes
import functools
import threading
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
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = (pointer, *[number] * 7, pointer, pointer, pointer)
    driver.cuMemsetD32Async.argtypes = (pointer, number, ctypes.c_size_t, pointer)
    return driver


class _Entered(threading.local):
    """The devices that this thread has a CUDA context of."""

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()


_entered = _Entered()


def ready_stream(device: torch.device) -> int:
    """Torch's current stream, on whose device this thread may use the driver from now on.

    The driver wants a CUDA context in each thread; torch makes one there when it first works on the device.
    """
    if device not in _entered.devices:
        torch.zeros(1, device=device)
        _entered.devices.add(device)
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


def _call(function: str, *arguments: Any) -> None:
    status = getattr(_driver(), function)(*arguments)
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{function} failed: {(name.value or b'unknown error').decode()} ({status})")


def load_kernel(cubin: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """A kernel for the current device, which may use ``shared_bytes`` of shared memory. It is never unloaded."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), cubin)
    _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
    return function


def tensor_map(tensor: Tensor, box: tuple[int, int]) -> bytes:
    """A 2-byte tensor as TMA sees it, in boxes swizzled by 128 bytes. Outside of it, a box is filled with zeros.

    Args:
        tensor: ``[rows, columns]`` or ``[matrices, rows, columns]``; columns are contiguous, the address and the other
            strides are multiples of 16 bytes.
        box: rows and columns that one copy takes, 64 columns at most.
    """
    return _encoded(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), box)


@functools.lru_cache(maxsize=4096)  # weights stay where they are, and activations come back to the same addresses
def _encoded(
    pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, int]
) -> bytes:
    rows, columns = shape[-2:]
    matrices, matrix_stride = (shape[0], strides[0]) if len(shape) == 3 else (1, rows * strides[0])
    row_bytes = strides[-2] * 2
    # cuda-bindings has a class for a map, but its memory is not aligned as the driver demands.
    memory = ctypes.create_string_buffer(2 * _MAP_BYTES)
    skipped = -ctypes.addressof(memory) % _MAP_BYTES
    _call(
        "cuTensorMapEncodeTiled", ctypes.byref(memory, skipped), _ELEMENTS[dtype], 3, ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 3)(columns, rows, matrices),
        (ctypes.c_uint64 * 2)(row_bytes, max(matrix_stride * 2, row_bytes)), (ctypes.c_uint32 * 3)(box[1], box[0], 1),
        (ctypes.c_uint32 * 3)(1, 1, 1), 0, _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, 0,
    )  # fmt: skip
    return memory.raw[skipped : skipped + _MAP_BYTES]


def launch(
    kernel: ctypes.c_void_p, blocks: int, threads: int, shared_bytes: int, stream: int,
    arguments: bytes, starts: Sequence[int],
) -> None:  # fmt: skip
    """Start a kernel. Of its arguments, which lie in one piece, each begins at one of ``starts``."""
    # Not through the driver's own way to take one piece ("extra"): in there, the compiler decides where each begins.
    memory = ctypes.create_string_buffer(arguments, len(arguments))
    address = ctypes.addressof(memory)
    addresses = (ctypes.c_void_p * len(starts))(*[address + start for start in starts])
    _call("cuLaunchKernel", kernel, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, addresses, None)


def set_to_zero(int32: Tensor, stream: int) -> None:
    """Set one int32 to 0, in a fraction of the host's time that ``zero_`` takes."""
    _call("cuMemsetD32Async", int32.data_ptr(), 0, 1, stream)
