"""Attention over packed documents written out: the oracle of the other kernels, and the path for what they lack.

Memory grows with the square of the longest document, never with the square of the row.
Shape suffixes: T tokens, H query heads, G key heads, D head width, L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_attention(
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
    """See `fastft_plugins.packing.packed_attention`. Scores and softmax are in fp32, or in fp64 for fp64 input."""
    documents = zip(q_THD.split(lengths), k_TGD.split(lengths), v_TGD.split(lengths), strict=True)
    return torch.cat([_document(q, k, v, scale, window, softcap, sinks_H) for q, k, v in documents])


def _document(
    q_LHD: Tensor,
    k_LGD: Tensor,
    v_LGD: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    length, heads, _ = q_LHD.shape
    precise = torch.float64 if q_LHD.dtype == torch.float64 else torch.float32
    repeats = heads // k_LGD.shape[1]
    q_HLD = q_LHD.transpose(0, 1).to(precise)
    k_HLD = k_LGD.transpose(0, 1).to(precise).repeat_interleave(repeats, 0)
    v_HLD = v_LGD.transpose(0, 1).to(precise).repeat_interleave(repeats, 0)
    scores_HLL = q_HLD @ k_HLD.transpose(1, 2) * scale
    if softcap is not None:
        scores_HLL = softcap * torch.tanh(scores_HLL / softcap)
    position_L = torch.arange(length, device=q_LHD.device)
    distance_LL = position_L[:, None] - position_L[None, :]
    hidden_LL = distance_LL < 0
    if window is not None:
        hidden_LL = hidden_LL | (distance_LL >= window)
    scores_HLL = scores_HLL.masked_fill(hidden_LL, -torch.inf)
    if sinks_H is not None:  # one more column that takes probability and adds nothing
        sink_HL1 = sinks_H.to(precise)[:, None, None].expand(heads, length, 1)
        scores_HLL = torch.cat([scores_HLL, sink_HL1], -1)
    weights_HLL = scores_HLL.softmax(-1)[..., :length]
    return (weights_HLL @ v_HLD).transpose(0, 1).to(q_LHD.dtype)
