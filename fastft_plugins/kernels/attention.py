"""Causal attention over packed documents: what a call looks like, and the kernels by rank.

Shape suffixes here and in the kernels: T tokens, H query heads, G key heads, D head width, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastft_plugins.kernels import attention_efficient, attention_flash, attention_reference, attention_sdpa
from fastft_plugins.kernels.dispatch import Kernel, not_on_nvidia


@dataclass(frozen=True)
class AttentionCall:
    """The properties of a call that decide which kernel can serve it."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    window: bool
    softcap: bool
    sinks: bool
    uneven: bool = False  # padded to the longest document, the row would grow more than `UNEVEN` times


UNEVEN = 8


def _flash_rejects(call: AttentionCall) -> str | None:
    reason = not_on_nvidia(call.device)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(call.device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {call.dtype}"
    if call.value_dim > call.head_dim:
        return f"needs values no wider than queries, got {call.value_dim} and {call.head_dim}"
    if call.head_dim % 8 or call.head_dim > 256:
        return f"needs a head width that is a multiple of 8 up to 256, got {call.head_dim}"
    return "has no softcap" if call.softcap else None


def _efficient_rejects(call: AttentionCall) -> str | None:
    reason = not_on_nvidia(call.device)
    if reason is not None:
        return reason
    if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"needs float16, bfloat16 or float32, got {call.dtype}"
    if call.dtype == torch.bfloat16 and torch.cuda.get_device_capability(call.device) < (8, 0):
        return "needs compute capability 8.0 for bfloat16"
    step = 4 if call.dtype == torch.float32 else 8
    if call.head_dim % step or call.value_dim % step:
        return f"needs head widths that are multiples of {step}, got {call.head_dim} and {call.value_dim}"
    if call.uneven:
        return f"pads to the longest document, here more than {UNEVEN} times the row"
    return _sdpa_rejects(call)


def _sdpa_rejects(call: AttentionCall) -> str | None:
    if call.softcap:
        return "has no softcap"
    return "has no sinks" if call.sinks else None


ATTENTION_KERNELS = (
    Kernel("flash varlen", 0, _flash_rejects, attention_flash.flash_attention),
    Kernel("memory-efficient varlen", 20, _efficient_rejects, attention_efficient.efficient_attention),
    Kernel("SDPA per document", 50, _sdpa_rejects, attention_sdpa.sdpa_attention),
    Kernel("reference per document", 100, lambda call: None, attention_reference.reference_attention),
)
