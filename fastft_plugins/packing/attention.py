"""Causal attention in which no token sees another document."""

from __future__ import annotations

import math

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
        scale: factor of the scores; ``D ** -0.5`` by default.

    Returns:
        ``[T, H, Dv]`` in the dtype of the queries, or autocast's where autocast is on.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    kind = q_THD.device.type
    has_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if has_autocast and q_THD.dtype != torch.float64:  # as SDPA does
        dtype = torch.get_autocast_dtype(kind)
        q_THD, k_TGD, v_TGD = q_THD.to(dtype), k_TGD.to(dtype), v_TGD.to(dtype)
    _check(q_THD, k_TGD, v_TGD, metadata, window, softcap, sinks, scale)
    if window is not None and window >= metadata.max_seqlen:
        window = None
    call = AttentionCall(
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
    run = choose("attention", call).kernel.run
    scale = q_THD.shape[-1] ** -0.5 if scale is None else scale
    lengths, cu_seqlens, max_seqlen = metadata.lengths, metadata.cu_seqlens, metadata.max_seqlen
    out_THD: Tensor = run(q_THD, k_TGD, v_TGD, cu_seqlens, lengths, max_seqlen, scale, window, softcap, sinks)
    return out_THD


def _check(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    metadata: PackedMetadata,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float | None,
) -> None:
    total = metadata.total_tokens
    for name, tensor in (("q_THD", q_THD), ("k_TGD", k_TGD), ("v_TGD", v_TGD)):
        if tensor.dim() != 3 or tensor.shape[0] != total:
            raise ValueError(f"{name}: has shape {list(tensor.shape)}; the metadata needs [{total}, heads, width]")
        if tensor.dtype != q_THD.dtype or tensor.device != q_THD.device:
            raise ValueError(f"{name}: is {tensor.dtype} on {tensor.device}; q_THD is {q_THD.dtype} on {q_THD.device}")
    heads, key_heads = q_THD.shape[1], k_TGD.shape[1]
    if key_heads == 0 or heads % key_heads or v_TGD.shape[1] != key_heads or k_TGD.shape[2] != q_THD.shape[2]:
        raise ValueError(
            f"k_TGD, v_TGD: have shapes {list(k_TGD.shape)} and {list(v_TGD.shape)}; need the width of q_THD "
            f"({q_THD.shape[2]}) for k_TGD and one number of heads that divides {heads} for both"
        )
    if metadata.cu_seqlens.device != q_THD.device:
        raise ValueError(f"metadata: is on {metadata.cu_seqlens.device}; move it with metadata.to('{q_THD.device}')")
    if q_THD.shape[2] == 0 or v_TGD.shape[2] == 0 or not q_THD.is_floating_point():
        raise ValueError(f"q_THD: is {q_THD.dtype} of width {q_THD.shape[2]}, v_TGD of {v_TGD.shape[2]}; needs floats")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window: is {window}; needs at least 1, an integer, or None for the whole document")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: is {softcap}; needs a finite number above 0, or None for none")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: is {scale}; needs a finite number, or None for D ** -0.5")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point() or sinks.device != q_THD.device):
        raise ValueError(
            f"sinks: is {sinks.dtype} {list(sinks.shape)} on {sinks.device}; needs floats [{heads}], one per query "
            f"head, on {q_THD.device}"
        )
