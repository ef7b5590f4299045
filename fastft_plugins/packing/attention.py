"""Causal attention in which no token sees another document."""

from __future__ import annotations

import math
import weakref
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fastft_plugins.kernels.attention import UNEVEN, AttentionCall
from fastft_plugins.kernels.dispatch import choose
from fastft_plugins.packing.metadata import PackedMetadata


def packed_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    metadata: PackedMetadata,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over the documents of one packed row, on any device; never builds a ``[T, T]`` mask.

    Args:
        q_THD: ``[T, H, D]`` queries.
        k_TGD: ``[T, G, D]`` keys; G divides H, and query heads share keys in groups of H / G.
        v_TGD: ``[T, G, Dv]`` values.
        metadata: the documents; its ``cu_seqlens`` must be on the device of the queries.
        window: a token sees itself and the ``window - 1`` tokens before it. None: the whole document.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: ``[H]`` logits of a token per head that takes probability and has no value (gpt-oss).
        scale: factor of the scores, more than 0; ``D ** -0.5`` by default.

    Returns:
        ``[T, H, Dv]`` in the dtype of the queries, or autocast's where autocast is on.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    device_type = q_THD.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):  # as SDPA does
        dtype = torch.get_autocast_dtype(device_type)
        q_THD, k_TGD, v_TGD = (
            tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (q_THD, k_TGD, v_TGD)
        )
    _check_numbers(window, softcap, scale)
    if window is not None and window >= metadata.max_seqlen:
        window = None
    call = _call_of(q_THD, k_TGD, v_TGD, metadata, window, softcap, sinks)
    run = choose("attention", call).kernel.run
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    lengths, cu_seqlens, max_seqlen = metadata.lengths, metadata.cu_seqlens, metadata.max_seqlen
    out_THD: Tensor = run(q_THD, k_TGD, v_TGD, cu_seqlens, lengths, max_seqlen, scale, window, softcap, sinks)
    return out_THD


# By batch, and by everything that a check looks at: layers of one kind are checked once.
_calls: weakref.WeakKeyDictionary[PackedMetadata, dict[tuple[Any, ...], AttentionCall]] = weakref.WeakKeyDictionary()


def _call_of(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    metadata: PackedMetadata,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionCall:
    """What decides which kernel can serve these tensors, once they have been found to fit together."""
    key = (
        q_THD.shape,
        k_TGD.shape,
        v_TGD.shape,
        q_THD.dtype,
        k_TGD.dtype,
        v_TGD.dtype,
        q_THD.device,
        k_TGD.device,
        v_TGD.device,
        window is None,
        softcap is None,
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device),
    )
    calls = _calls.get(metadata)
    if calls is None:
        calls = _calls.setdefault(metadata, {})
    call = calls.get(key)
    if call is None:
        _check_tensors(q_THD, k_TGD, v_TGD, metadata, sinks)
        call = calls[key] = AttentionCall(
            q_THD.device,
            q_THD.dtype,
            q_THD.shape[1],
            k_TGD.shape[1],
            q_THD.shape[2],
            v_TGD.shape[2],
            window is not None,
            softcap is not None,
            sinks is not None,
            len(metadata.lengths) * metadata.max_seqlen > UNEVEN * metadata.total_tokens,
        )
    return call


def _check_tensors(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, metadata: PackedMetadata, sinks: Tensor | None) -> None:
    total = metadata.total_tokens
    for name, tensor in (("q_THD", q_THD), ("k_TGD", k_TGD), ("v_TGD", v_TGD)):
        if tensor.dim() != 3 or tensor.shape[0] != total:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}; the metadata needs [{total}, heads, width]")
        if tensor.dtype != q_THD.dtype or tensor.device != q_THD.device:
            raise ValueError(f"{name}: is {tensor.dtype} on {tensor.device}; q_THD is {q_THD.dtype} on {q_THD.device}")
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}; needs at least one head, and a width above 0")
    heads, key_heads = q_THD.shape[1], k_TGD.shape[1]
    if heads % key_heads or v_TGD.shape[1] != key_heads or k_TGD.shape[2] != q_THD.shape[2]:
        raise ValueError(
            f"k_TGD, v_TGD: have shapes {list(k_TGD.shape)} and {list(v_TGD.shape)}; need the width of q_THD "
            f"({q_THD.shape[2]}) for k_TGD and one number of heads that divides {heads} for both"
        )
    if metadata.cu_seqlens.device != q_THD.device:
        raise ValueError(f"metadata: is on {metadata.cu_seqlens.device}; move it with metadata.to('{q_THD.device}')")
    if sinks is None:
        return
    if sinks.shape != (heads,):
        raise ValueError(f"sinks: has shape {list(sinks.shape)}; needs [{heads}], one per query head")
    if not sinks.is_floating_point() or sinks.device != q_THD.device:
        raise ValueError(f"sinks: is {sinks.dtype} on {sinks.device}; needs a floating-point dtype on {q_THD.device}")


def _check_numbers(window: Any, softcap: Any, scale: Any) -> None:
    # True is an int to Python, and never what somebody means here.
    if window is not None and (not isinstance(window, Integral) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window: is {window!r}; needs a whole number, at least 1, or None for the whole document")
    for name, value, default in (("softcap", softcap, "none"), ("scale", scale, "D ** -0.5")):
        if value is not None and (not isinstance(value, Real) or not math.isfinite(value) or value <= 0):
            raise ValueError(f"{name}: is {value!r}; needs a finite number, more than 0, or None for {default}")
