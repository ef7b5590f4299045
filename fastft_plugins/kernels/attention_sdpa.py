"""Attention over packed documents through torch's SDPA, one call for all the documents of one length.

Works on every device and dtype that SDPA supports. The lengths are known on the host, so nothing waits for a GPU.
Shape suffixes: T tokens, H query heads, G key heads, D head width, B documents of one length, L their length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """See `fastft_plugins.packing.packed_attention`; softcap and sinks are not supported here."""
    documents_of: dict[int, list[int]] = defaultdict(list)
    for document, length in enumerate(lengths):
        documents_of[length].append(document)
    q_N, k_N, v_N = q_THD.split(lengths), k_TGD.split(lengths), v_TGD.split(lengths)
    out_N: list[Tensor] = [q_THD] * len(lengths)
    for length, documents in documents_of.items():
        q_BHLD, k_BGLD, v_BGLD = (
            _stack([tensors[document] for document in documents]).transpose(1, 2) for tensors in (q_N, k_N, v_N)
        )
        if window is None or window >= length:
            out_BHLD = scaled_dot_product_attention(
                q_BHLD, k_BGLD, v_BGLD, is_causal=True, scale=scale, enable_gqa=q_BHLD.shape[1] != k_BGLD.shape[1]
            )
        else:
            out_BHLD = _windowed(q_BHLD, k_BGLD, v_BGLD, scale, window)
        for document, out_LHD in zip(documents, out_BHLD.transpose(1, 2).unbind(), strict=True):
            out_N[document] = out_LHD
    return torch.cat(out_N)


def _stack(documents: list[Tensor]) -> Tensor:
    return documents[0].unsqueeze(0) if len(documents) == 1 else torch.stack(documents)


def _windowed(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float, window: int) -> Tensor:
    """Blocks of queries against the keys they can see, so that memory grows with L times the window."""
    length, block = q_BHLD.shape[2], max(window, 128)
    outputs = []
    for start in range(0, length, block):
        end, first = min(start + block, length), max(0, start - window + 1)
        query_L = torch.arange(start, end, device=q_BHLD.device)
        key_L = torch.arange(first, end, device=q_BHLD.device)
        distance_LL = query_L[:, None] - key_L[None, :]
        outputs.append(
            scaled_dot_product_attention(
                q_BHLD[:, :, start:end],
                k_BGLD[:, :, first:end],
                v_BGLD[:, :, first:end],
                attn_mask=(distance_LL >= 0) & (distance_LL < window),
                scale=scale,
                enable_gqa=q_BHLD.shape[1] != k_BGLD.shape[1],
            )
        )
    return torch.cat(outputs, 2)
