"""The experts' activation, forward and backward, with the bias added in registers.

The backward recomputes a = act(z + b) and emits, from da = dO·W2ᵀ before the routing weight s: the gradient
dz = act'(z + b)·(s·da), the routing weight's gradient ds = ⟨da, a⟩, and, if W2 is trained, s·a, its other operand.

Shape suffixes: S routed rows, E experts, I intermediate width, N width of z (2·I, or I without a gate).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_plugins.kernels.gate import Gate


def gate_forward(
    gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, ids_S: Tensor, order_S: Tensor, offsets_E: Tensor
) -> Tensor:
    """See `fastft_plugins.kernels.gate.gate_forward`."""
    size, width = z_SN.shape[0], z_SN.shape[1] if gate.layout == "ungated" else z_SN.shape[1] // 2
    a_SI = torch.empty((size, width), dtype=z_SN.dtype, device=z_SN.device)
    bias_EN = None if bias_EN is None else bias_EN.contiguous()
    if a_SI.numel():
        columns = min(triton.next_power_of_2(width), 256)
        rows = 1024 // columns
        grid = (triton.cdiv(size, rows), triton.cdiv(width, columns))
        _forward[grid](
            z_SN, bias_EN, ids_S, order_S, a_SI, size, width, offsets_E.numel(),
            KIND=gate.kind, LAYOUT=gate.layout, ALPHA=gate.alpha, LIMIT=gate.limit, BIAS=bias_EN is not None,
            ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return a_SI


def gate_backward(
    gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, da_SI: Tensor, weights_S: Tensor, ids_S: Tensor,
    order_S: Tensor, offsets_E: Tensor, dz_SN: Tensor, dweights_S: Tensor, scaled_SI: Tensor | None,
) -> None:  # fmt: skip
    """See `fastft_plugins.kernels.gate.gate_backward`."""
    size, width = da_SI.shape
    bias_EN = None if bias_EN is None else bias_EN.contiguous()
    if da_SI.numel():
        # On an H200, 1024 columns of one row are 10 % faster for gpt-oss (2,880 wide), 4 rows of 256 for Qwen3 (768).
        columns = min(triton.next_power_of_2(width), 1024 if width >= 1024 else 256)
        rows = 1024 // columns
        _backward[(triton.cdiv(size, rows),)](
            z_SN, bias_EN, da_SI, weights_S, ids_S, order_S, offsets_E, dz_SN, dweights_S, scaled_SI, size, width,
            offsets_E.numel(), KIND=gate.kind, LAYOUT=gate.layout, ALPHA=gate.alpha, LIMIT=gate.limit,
            BIAS=bias_EN is not None, SCALED=scaled_SI is not None, ROWS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip


@triton.jit
def _at_most(x, limit: tl.constexpr):
    """x clamped from above. NaN stays NaN, as in torch's clamp and unlike in the hardware's minimum."""
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_least(x, limit: tl.constexpr):
    return tl.maximum(x, limit, propagate_nan=tl.PropagateNan.ALL)


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
def _gated(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """a, and its derivatives by gate and by up."""
    if KIND == "clamped_swiglu":  # gpt-oss: (up + 1) · gate · sigmoid(alpha · gate), both clamped
        low, middle = _at_most(gate, LIMIT), _at_most(_at_least(up, -LIMIT), LIMIT)
        sigmoid = tl.sigmoid(ALPHA * low)
        glu = low * sigmoid
        value = (middle + 1.0) * glu
        dgate = tl.where(gate <= LIMIT, (middle + 1.0) * sigmoid * (1.0 + ALPHA * low * (1.0 - sigmoid)), 0.0)
        dup = tl.where((up >= -LIMIT) & (up <= LIMIT), glu, 0.0)
    elif KIND == "limited_silu":  # silu(gate clamped from above) · (up clamped)
        low, middle = _at_most(gate, LIMIT), _at_most(_at_least(up, -LIMIT), LIMIT)
        active, slope = _act(low, "silu")
        value = active * middle
        dgate = tl.where(gate <= LIMIT, middle * slope, 0.0)
        dup = tl.where((up >= -LIMIT) & (up <= LIMIT), active, 0.0)
    else:
        active, slope = _act(gate, KIND)
        value = active * up
        dgate = up * slope
        dup = active
    return value, dgate, dup


@triton.jit
def _load_pair(ptr, rows, real, first, width, LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gate and up of z or of its bias, in fp32. Interleaved pairs are loaded as they lie in memory, then split."""
    base = ptr + rows[:, None] * (2 * width)
    if LAYOUT == "interleaved":
        pair = 2 * first + tl.arange(0, 2 * COLUMNS)
        inside = real[:, None] & (pair[None, :] < 2 * width)
        both = tl.load(base + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    else:
        columns = first + tl.arange(0, COLUMNS)
        inside = real[:, None] & (columns[None, :] < width)
        gate = tl.load(base + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(base + width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _row_expert(ids_ptr, order_ptr, rows, size, E):
    """The expert of each sorted row; sentinels, whose result is thrown away, take the last one."""
    slot = tl.load(order_ptr + rows, mask=rows < size, other=0)
    expert = tl.load(ids_ptr + slot, mask=rows < size, other=0).to(tl.int64)
    return tl.where((expert < 0) | (expert >= E), E - 1, expert)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["order_ptr"])
def _forward(
    z_ptr, bias_ptr, ids_ptr, order_ptr, a_ptr, size, width, E,
    KIND: tl.constexpr, LAYOUT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    real = rows < size
    inside = real[:, None] & (columns[None, :] < width)
    if BIAS:
        expert = _row_expert(ids_ptr, order_ptr, rows, size, E)
    if LAYOUT == "ungated":
        z = tl.load(z_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            z += tl.load(bias_ptr + expert[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        a, _ = _act(z, KIND)
    else:
        gate, up = _load_pair(z_ptr, rows, real, first, width, LAYOUT, ROWS, COLUMNS)
        if BIAS:
            gate_bias, up_bias = _load_pair(bias_ptr, expert, real, first, width, LAYOUT, ROWS, COLUMNS)
            gate += gate_bias
            up += up_bias
        a, _, _ = _gated(gate, up, KIND, ALPHA, LIMIT)
    tl.store(a_ptr + rows[:, None] * width + columns[None, :], a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["order_ptr"])
def _backward(
    z_ptr, bias_ptr, da_ptr, weights_ptr, ids_ptr, order_ptr, offsets_ptr, dz_ptr, dweights_ptr, scaled_ptr,
    size, width, E,
    KIND: tl.constexpr, LAYOUT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = rows < size
    slot = tl.load(order_ptr + rows, mask=real, other=0)
    scale = tl.load(weights_ptr + slot, mask=real, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        expert = _row_expert(ids_ptr, order_ptr, rows, size, E)
    dot = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = real[:, None] & (columns[None, :] < width)
        place = rows[:, None] * width + columns[None, :]
        da = tl.load(da_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if LAYOUT == "ungated":
            z = tl.load(z_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                at = expert[:, None] * width + columns[None, :]
                z += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
            a, slope = _act(z, KIND)
            tl.store(dz_ptr + place, (scale * da * slope).to(dz_ptr.dtype.element_ty), mask=inside)
        else:
            gate, up = _load_pair(z_ptr, rows, real, first, width, LAYOUT, ROWS, COLUMNS)
            if BIAS:
                gate_bias, up_bias = _load_pair(bias_ptr, expert, real, first, width, LAYOUT, ROWS, COLUMNS)
                gate += gate_bias
                up += up_bias
            a, by_gate, by_up = _gated(gate, up, KIND, ALPHA, LIMIT)
            dgate = (scale * da * by_gate).to(dz_ptr.dtype.element_ty)
            dup = (scale * da * by_up).to(dz_ptr.dtype.element_ty)
            base = dz_ptr + rows[:, None] * (2 * width)
            if LAYOUT == "interleaved":
                pair = 2 * first + tl.arange(0, 2 * COLUMNS)
                known = real[:, None] & (pair[None, :] < 2 * width)
                tl.store(base + pair[None, :], tl.reshape(tl.join(dgate, dup), (ROWS, 2 * COLUMNS)), mask=known)
            else:
                tl.store(base + columns[None, :], dgate, mask=inside)
                tl.store(base + width + columns[None, :], dup, mask=inside)
        dot += tl.sum(tl.where(inside, da * a, 0.0), 1)
        if SCALED:
            tl.store(scaled_ptr + place, (scale * a).to(scaled_ptr.dtype.element_ty), mask=inside)
    routed = tl.load(offsets_ptr + E - 1)  # the rows of sentinels hold anything: their gradient is 0
    tl.store(dweights_ptr + slot, tl.where(rows < routed, dot, 0.0), mask=real)
