"""One of the experts' two linear maps, with LoRA beside its weight, forward and backward.

Shape suffixes: S rows in expert order, E experts, R rank of LoRA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastft_plugins.kernels.grouped_matmul import grouped_matmul, grouped_weight_bias_grad, grouped_weight_grad
from fastft_plugins.kernels.rows import Rows, segment_sum


class Projection(NamedTuple):
    """One of the two linear maps of every expert: ``rows @ weight + bias``, plus ``rows @ lora_a @ lora_b``.

    Attributes:
        weight: ``[E, in, out]``, any strides.
        bias: ``[E, out]`` or None.
        lora_a: ``[E, in, R]`` or None.
        lora_b: ``[E, R, out]`` or None; the scale of LoRA is part of it.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Projection:
        """The same map in another dtype; differentiable."""
        bias, lora_a, lora_b = (part if part is None else part.to(dtype) for part in self[1:])
        return Projection(self.weight.to(dtype), bias, lora_a, lora_b)


def project(rows: Rows, projection: Projection, offsets_E: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows' products without the bias, and their image in LoRA's low dimension."""
    out = grouped_matmul(rows, projection.weight, offsets_E)
    if projection.lora_a is None or projection.lora_b is None:
        return out, None
    low_SR = grouped_matmul(rows, projection.lora_a, offsets_E)
    return grouped_matmul(Rows(low_SR), projection.lora_b, offsets_E, out), low_SR


def project_back(douts: Rows, projection: Projection, offsets_E: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient of the rows that `project` was given, and of their image in LoRA's low dimension."""
    out = grouped_matmul(douts, projection.weight.transpose(1, 2), offsets_E)
    dlow_SR = low_back(douts, projection, offsets_E)
    if dlow_SR is None or projection.lora_a is None:
        return out, None
    return grouped_matmul(Rows(dlow_SR), projection.lora_a.transpose(1, 2), offsets_E, out), dlow_SR


def low_back(douts: Rows, projection: Projection, offsets_E: Tensor) -> Tensor | None:
    """The gradient of the rows' image in LoRA's low dimension, ``[S, R]``."""
    if projection.lora_b is None:
        return None
    return grouped_matmul(douts, projection.lora_b.transpose(1, 2), offsets_E)


class Low(NamedTuple):
    """The rows' image in LoRA's low dimension, ``[S, R]``, and its gradient."""

    value: Tensor | None
    grad: Tensor | None


def parameter_grads(
    rows: Rows | Tensor | None,
    douts: Rows,
    projection: Projection,
    need: Projection,
    low: Low,
    offsets_E: Tensor,
    scales_S: Tensor | None = None,
    order_S: Tensor | None = None,
) -> Projection:
    """The gradients of a projection's parameters, each where it is needed.

    ``scales_S`` (by slot) belong to the outputs of the second projection: its rows come scaled, ``low`` does not.
    """
    row_scales_S = None
    if scales_S is not None and order_S is not None and (need.bias or need.lora_b):
        row_scales_S = scales_S.index_select(0, order_S)
    rows = Rows(rows) if isinstance(rows, Tensor) else rows
    dweight = dbias = da = db = None
    need_bias = need.bias and projection.bias is not None
    if need.weight and rows is not None:
        if projection.weight.stride(2) == 1 and need_bias:
            dweight, dbias = grouped_weight_bias_grad(rows, douts, offsets_E, row_scales_S)
        else:
            dweight = _weight_grad(projection.weight, rows, douts, offsets_E)
    if need_bias and dbias is None:
        dbias = segment_sum(douts, offsets_E, row_scales_S)
    if dbias is not None and projection.bias is not None:
        dbias = dbias.to(projection.bias.dtype)
    if need.lora_a and projection.lora_a is not None and low.grad is not None and rows is not None:
        da = _weight_grad(projection.lora_a, rows, Rows(low.grad), offsets_E)
    if need.lora_b and projection.lora_b is not None and low.value is not None:
        low_SR = low.value if row_scales_S is None else (low.value * row_scales_S[:, None]).to(low.value.dtype)
        db = _weight_grad(projection.lora_b, Rows(low_SR), douts, offsets_E)
    return Projection(dweight, dbias, da, db)  # type: ignore[arg-type]


def _weight_grad(weight: Tensor, rows: Rows, douts: Rows, offsets_E: Tensor) -> Tensor:
    """The gradient in the layout of the parameter behind ``weight``, which may be a transposed view of it."""
    if weight.stride(2) == 1:
        return grouped_weight_grad(rows, douts, offsets_E)
    return grouped_weight_grad(douts, rows, offsets_E).transpose(1, 2)
