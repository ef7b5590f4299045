"""Attention over packed documents through torch's own flash kernel (SM80 and newer), without a host sync.

The aten operators are called directly because `torch.nn.attention.varlen` hides grouped heads in torch 2.11 and offers
no sinks in any version. Sinks need no kernel of their own: a sink adds exp(sink) to the softmax's denominator, so
    out' = out · exp(lse − lse'),  lse' = logaddexp(lse, sink),
and the stock backward, given out' and lse', recomputes exactly the probabilities that the sink has thinned.

Shape suffixes: T tokens, H query heads, G key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Elements that the kernel's backward can address with 32-bit indices; beyond it reads and writes out of bounds.
_INT32_LIMIT = 2**31


def flash_attention(
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
    """See `fastft_plugins.packing.packed_attention`. Rows too long for 32-bit indices are split between documents."""
    _, heads, head_dim = q_THD.shape
    value_dim = v_TGD.shape[2]
    if value_dim < head_dim:  # zeros are exact, and faster than the memory-efficient kernel, which takes any width
        v_TGD = pad(v_TGD, (0, head_dim - value_dim))
    if sinks_H is not None:
        sinks_H = sinks_H.float()  # so that the gradients of several launches add up in fp32

    def launch(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        call = (q_THD, k_TGD, v_TGD, cu_seqlens, max_seqlen, scale, window)
        if sinks_H is None:  # torch's own derivative is the same kernel, and costs the host less than one in Python
            return _forward(*call)[0]
        out_THD: Tensor = _WithSinks.apply(*call, sinks_H)  # type: ignore[no-untyped-call]
        return out_THD

    ranges = split_documents(lengths, heads, head_dim)
    if len(ranges) == 1:
        out_THD = launch(q_THD, k_TGD, v_TGD, cu_seqlens, max_seqlen)
    else:
        outputs = []
        for first, last in ranges:
            start = sum(lengths[:first])
            rows = slice(start, start + sum(lengths[first:last]))
            cu, longest = cu_seqlens[first : last + 1] - start, max(lengths[first:last])
            outputs.append(launch(q_THD[rows], k_TGD[rows], v_TGD[rows], cu, longest))
        out_THD = torch.cat(outputs)
    return out_THD if value_dim == head_dim else out_THD[..., :value_dim]


def _forward(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, ...]:
    """The attention ``[T, H, D]``, its log-sum-exp ``[H, T]``, and what the backward wants beside them."""
    outputs: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward.default(
        q_THD,
        k_TGD,
        v_TGD,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    return outputs


def split_documents(lengths: Sequence[int], heads: int, head_dim: int) -> list[tuple[int, int]]:
    """Ranges of documents ``(first, last)`` that one launch of the backward can address.

    The backward indexes a buffer of (tokens + 128 · documents) · heads · round32(head_dim) elements with 32 bits.

    Raises:
        ValueError: if one document alone is too long.
    """
    per_row = heads * (-(-head_dim // 32) * 32)
    if (sum(lengths) + 128 * len(lengths)) * per_row < _INT32_LIMIT:
        return [(0, len(lengths))]
    ranges, first, rows = [], 0, 0
    for document, length in enumerate(lengths):
        if (length + 128) * per_row >= _INT32_LIMIT:
            raise ValueError(
                f"document {document} has {length} tokens; with {heads} heads of width {head_dim} the flash kernel "
                f"can address {_INT32_LIMIT // per_row - 129}: use shorter documents"
            )
        if (rows + length + 128) * per_row >= _INT32_LIMIT:
            ranges.append((first, document))
            first, rows = document, 0
        rows += length + 128
    return [*ranges, (first, len(lengths))]


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        sinks_H: Tensor,
    ) -> Tensor:
        out_THD, lse_HT, rng_state, unused, _ = _forward(q_THD, k_TGD, v_TGD, cu_seqlens, max_seqlen, scale, window)
        with_sink_HT = torch.logaddexp(lse_HT, sinks_H[:, None])
        kept_TH1 = (lse_HT - with_sink_HT).exp().t().unsqueeze(-1)
        out_THD, lse_HT = (out_THD * kept_TH1).to(q_THD.dtype), with_sink_HT
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, lse_HT, cu_seqlens, rng_state, unused, sinks_H)
        ctx.max_seqlen, ctx.scale, ctx.left = max_seqlen, scale, -1 if window is None else window - 1
        return out_THD

    @staticmethod
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TGD, v_TGD, out_THD, lse_HT, cu_seqlens, rng_state, unused, sinks_H = ctx.saved_tensors
        dq_THD, dk_TGD, dv_TGD = torch.ops.aten._flash_attention_backward.default(
            dout_THD.contiguous(),
            q_THD,
            k_TGD,
            v_TGD,
            out_THD,
            lse_HT,
            cu_seqlens,
            cu_seqlens,
            ctx.max_seqlen,
            ctx.max_seqlen,
            0.0,
            True,
            rng_state,
            unused,
            scale=ctx.scale,
            window_size_left=ctx.left,
            window_size_right=0,
        )
        dsinks_H = None
        if ctx.needs_input_grad[7]:
            # d(sink) = −Σ p_sink · (dO · out'), the same row sum that the softmax's own backward subtracts
            row_sum_HT = (dout_THD.float() * out_THD.float()).sum(-1).t()
            p_sink_HT = (sinks_H[:, None] - lse_HT).exp()
            dsinks_H = -(p_sink_HT * row_sum_HT).sum(1)
        return dq_THD, dk_TGD, dv_TGD, None, None, None, None, dsinks_H
