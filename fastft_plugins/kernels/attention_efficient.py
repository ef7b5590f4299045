"""Attention over packed documents through torch's memory-efficient kernel: older cards, fp32, values of any width.

One launch for all documents. Its log-sum-exp is padded to the longest of them, so it is not used where that would hold
far more than the row. Keys and values are repeated to the query heads, which it demands.

Shape suffixes: T tokens, H query heads, G key heads, D head width, B the batch dimension of size one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CAUSAL = 1  # from the top left; queries and keys of a document are equally many


def efficient_attention(
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
    repeats = q_THD.shape[1] // k_TGD.shape[1]
    if repeats > 1:
        k_TGD, v_TGD = k_TGD.repeat_interleave(repeats, 1), v_TGD.repeat_interleave(repeats, 1)
    rows = (q_THD[None], k_TGD[None], v_TGD[None])
    out_BTHD: Tensor = _EfficientVarlen.apply(*rows, cu_seqlens, max_seqlen, scale, window)  # type: ignore[no-untyped-call]
    return out_BTHD.squeeze(0)  # not [0], whose backward copies


class _EfficientVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out_BTHD: Tensor
        out_BTHD, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward.default(
            q_BTHD,
            k_BTHD,
            v_BTHD,
            None,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            0.0,
            _CAUSAL,
            True,
            scale=scale,
            window_size=window,
        )
        ctx.save_for_backward(q_BTHD, k_BTHD, v_BTHD, out_BTHD, lse, seed, offset, cu_seqlens)
        ctx.max_seqlen, ctx.scale, ctx.window = max_seqlen, scale, window
        return out_BTHD

    @staticmethod
    def backward(ctx: Any, dout_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHD, k_BTHD, v_BTHD, out_BTHD, lse, seed, offset, cu_seqlens = ctx.saved_tensors
        dq_BTHD, dk_BTHD, dv_BTHD, _ = torch.ops.aten._efficient_attention_backward.default(
            dout_BTHD.contiguous(),
            q_BTHD,
            k_BTHD,
            v_BTHD,
            None,
            out_BTHD,
            cu_seqlens,
            cu_seqlens,
            ctx.max_seqlen,
            ctx.max_seqlen,
            lse,
            0.0,
            seed,
            offset,
            _CAUSAL,
            False,
            scale=ctx.scale,
            window_size=ctx.window,
        )
        return dq_BTHD, dk_BTHD, dv_BTHD, None, None, None, None
