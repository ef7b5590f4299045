"""torch's own grouped matmul, which has a fast path for bfloat16 on compute capability 9 and 10 only."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastft_plugins.kernels.grouped_matmul_reference import reference_grouped_matmul, reference_grouped_weight_grad
from fastft_plugins.kernels.rows import Rows


def torch_grouped_matmul(rows: Rows, weight_EKN: Tensor, offsets_E: Tensor, out_SN: None = None) -> Tensor:
    return _grouped_mm(rows.gathered(), weight_EKN, offsets_E)


def torch_grouped_weight_grad(rows: Rows, grads: Rows, offsets_E: Tensor) -> Tensor:
    return _grouped_mm(rows.gathered().t(), grads.gathered(), offsets_E)


def _grouped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    out: Tensor = function(a, b, offs=offsets_E)
    return out


@functools.cache
def torch_is_right(device: torch.device) -> bool:
    """Compare a small product in each layout with a loop: a wrong result for transposed views was once reported.

    Source: https://github.com/pytorch/pytorch/issues/186365. Waits for the device, once.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows = Rows(torch.randn((96, 64), generator=generator, device=device).bfloat16())
    square_EKN = torch.randn((3, 64, 64), generator=generator, device=device).bfloat16()
    offsets_E = torch.tensor([33, 33, 96], dtype=torch.int32, device=device)
    pairs = [
        (torch_grouped_matmul(rows, weight, offsets_E), reference_grouped_matmul(rows, weight, offsets_E))
        for weight in (square_EKN, square_EKN.transpose(1, 2))
    ]
    pairs.append(
        (torch_grouped_weight_grad(rows, rows, offsets_E), reference_grouped_weight_grad(rows, rows, offsets_E))
    )
    return all(torch.allclose(got, expected, rtol=0.02, atol=0.2) for got, expected in pairs)
