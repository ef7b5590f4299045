"""The grouped products expert by expert, in plain torch: for a CPU, and what the other kernels are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft_plugins.kernels.rows import Rows


def reference_grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: Tensor | None = None) -> Tensor:
    """Expert by expert. On a GPU the host waits for the offsets."""
    rows_SK = rows.gathered()
    if out_SN is None:
        out_SN = rows_SK.new_zeros((rows_SK.shape[0], weight_EKN.shape[2]))
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            out_SN[start:end] += rows_SK[start:end] @ weight_EKN[expert]
        start = end
    return out_SN


def reference_grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    """Expert by expert. On a GPU the host waits for the offsets."""
    rows_SK, grads_SN = rows.gathered(), grads.gathered()
    out_EKN = rows_SK.new_zeros((offsets_E.numel(), rows_SK.shape[1], grads_SN.shape[1]))
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(rows_SK[start:end].t(), grads_SN[start:end], out=out_EKN[expert])
        start = end
    return out_EKN
