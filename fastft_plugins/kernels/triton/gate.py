"""The experts' activation, forward and backward, with the bias added in registers.

A program takes rows of one expert, so that its bias is one row for all of them. The backward recomputes a = act(z + b)
and emits, from da = dO·W2ᵀ before the routing weight s: the gradient dz = act'(z + b)·(s·da), the routing weight's
gradient ds = ⟨da, a⟩, and, if W2 is trained, s·a, its other operand. Summing dz for the bias here as well was tried:
the sums spill registers, and a pass of their own over dz is faster.

Shape suffixes: S routed rows, E experts, I intermediate width, N width of z (2·I, or I without a gate).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_plugins.kernels.gate import Gate
from fastft_plugins.kernels.triton.launch import launch
from fastft_plugins.kernels.triton.segments import find_tile
from fastft_plugins.kernels.triton_support import cdiv, next_power_of_2


def gate_forward(gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, order_S: Tensor, offsets_E: Tensor) -> Tensor:
    """See `fastft_plugins.kernels.gate.gate_forward`."""
    size, width = z_SN.shape[0], z_SN.shape[1] if gate.layout == "ungated" else z_SN.shape[1] // 2
    experts = offsets_E.numel()
    a_SI = torch.empty((size, width), dtype=z_SN.dtype, device=z_SN.device)
    bias_EN = None if bias_EN is None else bias_EN.contiguous()
    if a_SI.numel():
        rows, columns = _tile(width)
        launch(
            _forward, (cdiv(size, rows) + experts, 1, 1),
            z_SN, bias_EN, offsets_E, a_SI, width, experts,
            KIND=gate.kind, LAYOUT=gate.layout, ALPHA=gate.alpha, LIMIT=gate.limit, BIAS=bias_EN is not None,
            EXPERTS=next_power_of_2(experts), ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return a_SI


def gate_backward(
    gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, da_SI: Tensor, weights_S: Tensor, order_S: Tensor,
    offsets_E: Tensor, dz_SN: Tensor, dweights_S: Tensor, scaled_SI: Tensor | None,
) -> None:  # fmt: skip
    """See `fastft_plugins.kernels.gate.gate_backward`."""
    (size, width), experts = da_SI.shape, offsets_E.numel()
    bias_EN = None if bias_EN is None else bias_EN.contiguous()
    if da_SI.numel():
        rows, columns = _tile(width)
        launch(
            _backward, (cdiv(size, rows) + experts, 1, 1),
            z_SN, bias_EN, da_SI, weights_S, order_S, offsets_E, dz_SN, dweights_S, scaled_SI, width, experts,
            KIND=gate.kind, LAYOUT=gate.layout, ALPHA=gate.alpha, LIMIT=gate.limit, BIAS=bias_EN is not None,
            SCALED=scaled_SI is not None, SLOPE_AT_LIMIT=clamp_has_slope_at_limit(),
            EXPERTS=next_power_of_2(experts), ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip


@functools.cache
def clamp_has_slope_at_limit() -> bool:
    """Whether a value equal to its limit has a gradient: in torch up to 2.13 it has, from 2.14 on it has none.

    bf16 values do meet their limit, so the kernel follows the torch that stock would run with (pytorch#195931).
    """
    with torch.inference_mode(False), torch.enable_grad():
        limit = torch.zeros(1, device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(limit.clamp(max=0.0), limit, torch.ones(1, device="cpu"))
    return bool(slope)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's step: the fastest of a dozen on an H200, within 10 % of the bytes' own time."""
    return (1, 512) if width >= 1024 else (4, min(next_power_of_2(width), 128))


@triton.jit
def _at_most(x, limit: tl.constexpr):
    """x clamped from above. NaN stays NaN, as in torch's clamp and unlike in the hardware's minimum."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_least(x, limit: tl.constexpr):
    return tl.maximum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _below(x, limit: tl.constexpr, OR_AT: tl.constexpr):
    return x <= limit if OR_AT else x < limit


@triton.jit
def _act(x, KIND: tl.constexpr):
    """The activation and its derivative, of the gate or of an ungated z."""
    if KIND == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif KIND == "gelu":
        phi = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * phi
        slope = phi + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
        half = tl.sigmoid(2.0 * inner)  # (1 + tanh(inner)) / 2
        value = x * half
        slope = half + x * 2.0 * half * (1.0 - half) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(KIND == "relu2")
        positive = _at_least(x, 0.0)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def _gated(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SLOPE_AT_LIMIT: tl.constexpr):
    """a, and its derivatives by gate and by up."""
    if KIND == "clamped_swiglu":  # gpt-oss: (up + 1) · gate · sigmoid(alpha · gate), both clamped
        low, middle = _at_most(gate, LIMIT), _at_most(_at_least(up, -LIMIT), LIMIT)
        sigmoid = tl.sigmoid(ALPHA * low)
        glu = low * sigmoid
        value = (middle + 1.0) * glu
        slope = (middle + 1.0) * sigmoid * (1.0 + ALPHA * low * (1.0 - sigmoid))
        dgate = tl.where(_below(gate, LIMIT, SLOPE_AT_LIMIT), slope, 0.0)
        dup = tl.where(_below(up, LIMIT, SLOPE_AT_LIMIT) & _below(-up, LIMIT, SLOPE_AT_LIMIT), glu, 0.0)
    elif KIND == "limited_silu":  # silu(gate clamped from above) · (up clamped)
        low, middle = _at_most(gate, LIMIT), _at_most(_at_least(up, -LIMIT), LIMIT)
        active, slope = _act(low, "silu")
        value = active * middle
        dgate = tl.where(_below(gate, LIMIT, SLOPE_AT_LIMIT), middle * slope, 0.0)
        dup = tl.where(_below(up, LIMIT, SLOPE_AT_LIMIT) & _below(-up, LIMIT, SLOPE_AT_LIMIT), active, 0.0)
    else:
        active, slope = _act(gate, KIND)
        value = active * up
        dgate = up * slope
        dup = active
    return value, dgate, dup


@triton.jit
def _load_pair(ptr, first, width, inside_rows, LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gate and up of some rows of z, or of a bias, in fp32. Interleaved pairs are loaded as they lie, then split."""
    if LAYOUT == "interleaved":
        pair = 2 * first + tl.arange(0, 2 * COLUMNS)
        both = tl.load(ptr + pair[None, :], mask=inside_rows & (pair[None, :] < 2 * width), other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    else:
        columns = first + tl.arange(0, COLUMNS)
        inside = inside_rows & (columns[None, :] < width)
        gate = tl.load(ptr + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(ptr + width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _store_pair(
    ptr, gate, up, first, width, inside_rows, LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    gate, up = gate.to(ptr.dtype.element_ty), up.to(ptr.dtype.element_ty)
    if LAYOUT == "interleaved":
        pair = 2 * first + tl.arange(0, 2 * COLUMNS)
        both = tl.reshape(tl.join(gate, up), (ROWS, 2 * COLUMNS))
        tl.store(ptr + pair[None, :], both, mask=inside_rows & (pair[None, :] < 2 * width))
    else:
        columns = first + tl.arange(0, COLUMNS)
        inside = inside_rows & (columns[None, :] < width)
        tl.store(ptr + columns[None, :], gate, mask=inside)
        tl.store(ptr + width + columns[None, :], up, mask=inside)


@triton.jit
def _forward(
    z_ptr, bias_ptr, offsets_ptr, a_ptr, width, E,
    KIND: tl.constexpr, LAYOUT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert, top, end = find_tile(offsets_ptr, E, tl.program_id(0), EXPERTS, ROWS)
    if expert < 0:
        return
    rows = (top + tl.arange(0, ROWS))[:, None].to(tl.int64)
    real = rows < end
    one = tl.full((1, 1), 1, tl.int1)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        inside = real & (columns < width)
        if LAYOUT == "ungated":
            z = tl.load(z_ptr + rows * width + columns, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                z += tl.load(bias_ptr + expert.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
            a, _ = _act(z, KIND)
        else:
            gate, up = _load_pair(z_ptr + rows * 2 * width, first, width, real, LAYOUT, ROWS, COLUMNS)
            if BIAS:
                bias = bias_ptr + expert.to(tl.int64) * 2 * width
                gate_bias, up_bias = _load_pair(bias, first, width, one, LAYOUT, 1, COLUMNS)
                gate += gate_bias
                up += up_bias
            a, _, _ = _gated(gate, up, KIND, ALPHA, LIMIT, True)
        tl.store(a_ptr + rows * width + columns, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["order_ptr"])
def _backward(
    z_ptr, bias_ptr, da_ptr, weights_ptr, order_ptr, offsets_ptr, dz_ptr, dweights_ptr, scaled_ptr, width, E,
    KIND: tl.constexpr, LAYOUT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr,
    SCALED: tl.constexpr, SLOPE_AT_LIMIT: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    expert, top, end = find_tile(offsets_ptr, E, tl.program_id(0), EXPERTS, ROWS)
    if expert < 0:
        return
    rows = (top + tl.arange(0, ROWS))[:, None].to(tl.int64)
    real = rows < end
    one = tl.full((1, 1), 1, tl.int1)
    slot = tl.load(order_ptr + rows, mask=real, other=0)
    scale = tl.load(weights_ptr + slot, mask=real, other=0.0).to(tl.float32)
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        inside = real & (columns < width)
        place = rows * width + columns
        da = tl.load(da_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if LAYOUT == "ungated":
            z = tl.load(z_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                z += tl.load(bias_ptr + expert.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
            a, slope = _act(z, KIND)
            dz = scale * da * slope
            tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        else:
            gate, up = _load_pair(z_ptr + rows * 2 * width, first, width, real, LAYOUT, ROWS, COLUMNS)
            if BIAS:
                bias = bias_ptr + expert.to(tl.int64) * 2 * width
                gate_bias, up_bias = _load_pair(bias, first, width, one, LAYOUT, 1, COLUMNS)
                gate += gate_bias
                up += up_bias
            a, by_gate, by_up = _gated(gate, up, KIND, ALPHA, LIMIT, SLOPE_AT_LIMIT)
            dgate = scale * da * by_gate
            dup = scale * da * by_up
            _store_pair(dz_ptr + rows * 2 * width, dgate, dup, first, width, real, LAYOUT, ROWS, COLUMNS)
        dot += da * a  # da is 0 outside
        if SCALED:
            tl.store(scaled_ptr + place, (scale * a).to(scaled_ptr.dtype.element_ty), mask=inside)
    tl.store(dweights_ptr + slot, tl.sum(dot, 1)[:, None], mask=real)
