"""This package's kernels for GPUs: whether Triton can serve a call, and how to call them without importing triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastft_plugins.kernels.dispatch import not_on_nvidia

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class TensorCall:
    """What decides about a kernel that works on any shape."""

    device: torch.device
    dtype: torch.dtype


def triton_rejects(call: TensorCall) -> str | None:
    """The reason why a Triton kernel cannot serve this call, or None."""
    reason = not_on_nvidia(call.device)
    if reason is not None:
        return reason
    if call.dtype not in _DTYPES:
        return f"needs bfloat16, float16 or float32, got {call.dtype}"
    if not _has_triton():
        return "needs triton, which is not installed"
    capability = torch.cuda.get_device_capability(call.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """A function of ``fastft_plugins.kernels.triton``, whose module is imported at the first call."""
    return gpu_kernel(f"triton.{module}", function)


def gpu_kernel(module: str, function: str) -> Callable[..., Any]:
    """A function of a module in ``fastft_plugins.kernels``, imported at the first call, run on its tensors' device."""

    @functools.cache
    def kernel() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"fastft_plugins.kernels.{module}"), function)
        return found

    def run(*arguments: Any) -> Any:
        if _one_gpu():
            return kernel()(*arguments)
        # Kernels start on the current device, which a model spread over several GPUs does not change between layers.
        tensors = (getattr(argument, "source_XH", argument) for argument in arguments)
        with torch.cuda.device_of(next(tensor for tensor in tensors if isinstance(tensor, torch.Tensor))):
            return kernel()(*arguments)

    return run


@functools.cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up. ``triton.cdiv`` takes microseconds of the host, as does its ``next_power_of_2``."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them ``device`` has, which is how many blocks a kernel starts that hands tiles to each."""
    return torch.cuda.get_device_properties(device).multi_processor_count
