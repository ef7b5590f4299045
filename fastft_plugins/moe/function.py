"""The experts' forward and backward as one autograd function.

It keeps x, the pre-activation z, the routing weights and int32 indices, and recomputes the rest. With a = act(z + b1),
s the routing weight of a row and dO the gradient of its token's output:

    da = dO · W2ᵀ      ds = ⟨da, a⟩ + ⟨dO, b2⟩      dz = act'(z + b1) · (s · da)      dx = Σ_k dz · W1ᵀ
    dW1 = xᵀ · dz      dW2 = (s · a)ᵀ · dO          db1 = Σ dz                        db2 = Σ s · dO

The routing weight is applied after W2's transpose, so that no row of width H is scaled, and ds needs no output of W2.

Shape suffixes: T tokens, K experts of a token, S = T·K rows, E experts, H hidden width, I intermediate width, N width
of z (2·I, or I without a gate).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastft_plugins.kernels.gate import Gate, gate_backward, gate_forward
from fastft_plugins.kernels.rows import Rows, combine_rows, sum_dtype
from fastft_plugins.moe.projection import Low, Projection, low_back, parameter_grads, project, project_back
from fastft_plugins.moe.routing import Routing

_T = TypeVar("_T")


def run_experts(
    x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, routing: Routing, gate: Gate, up: Projection, down: Projection,
    *, combine: bool = True,
) -> Tensor:  # fmt: skip
    """Each token's weighted sum over its experts, ``[T, H]``; or, without ``combine``, the rows ``[S, H]`` before it.

    ``x_TH``, the weights, biases and LoRA factors must have one dtype; the result has it too.
    """
    out: Tensor = _Experts.apply(x_TH, weights_TK, *up, *down, ids_TK, routing, gate, combine)  # type: ignore[no-untyped-call]
    return out


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast. Where autocast is off already nothing is entered, which takes the host time."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def _without_autocast(backward: Callable[[Any, Tensor], _T]) -> Callable[[Any, Tensor], _T]:
    """The caller of a backward may be under autocast still, which would lower the precision of its fp32 products."""

    @functools.wraps(backward)
    def run(ctx: Any, dout: Tensor) -> _T:
        with autocast_off(dout.device.type):
            return backward(ctx, dout)

    return run


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weights_TK: Tensor,
        w1: Tensor, b1: Tensor | None, a1: Tensor | None, c1: Tensor | None,
        w2: Tensor, b2: Tensor | None, a2: Tensor | None, c2: Tensor | None,
        ids_TK: Tensor,
        routing: Routing,
        gate: Gate,
        combine: bool,
    ) -> Tensor:  # fmt: skip
        order_S, inverse_S, _, offsets_E = routing
        up, down = Projection(w1, b1, a1, c1), Projection(w2, b2, a2, c2)
        inverse_TK = inverse_S.view_as(ids_TK)
        z_SN, low1_SR = project(Rows(x_TH, order_S, ids_TK.shape[1], inverse_TK), up, offsets_E)
        parts = []
        for span, ends_E in _spans(down.weight, offsets_E, order_S):
            a_SI = gate_forward(gate, _part(z_SN, span), b1, _part(order_S, span), ends_E)
            parts.append(project(Rows(a_SI), down, ends_E))
            del a_SI
        out_SH = _joined([out for out, _ in parts])
        low2_SR = _joined([low for _, low in parts if low is not None]) if c2 is not None else None
        del parts
        ctx.save_for_backward(
            x_TH, weights_TK, *up, *down, z_SN, low1_SR, low2_SR, order_S, inverse_S, offsets_E, ids_TK
        )
        ctx.gate, ctx.combine = gate, combine
        if not combine:
            if b2 is not None:
                expert_S = ids_TK.reshape(-1).index_select(0, order_S).clamp(0, b2.shape[0] - 1)
                out_SH = out_SH + b2.index_select(0, expert_S)
            return out_SH
        return combine_rows(out_SH, inverse_TK, offsets_E, weights_TK, b2, ids_TK)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_TH, weights_TK, w1, b1, a1, c1, w2, b2, a2, c2,
            z_SN, low1_SR, low2_SR, order_S, inverse_S, offsets_E, ids_TK,
        ) = ctx.saved_tensors  # fmt: skip
        need_x, need_weights, *need = ctx.needs_input_grad[:10]
        need_up, need_down = Projection(*need[:4]), Projection(*need[4:])
        up, down = Projection(w1, b1, a1, c1), Projection(w2, b2, a2, c2)
        dout = dout.contiguous()
        scales_S = weights_TK.reshape(-1) if ctx.combine else torch.ones_like(order_S, dtype=dout.dtype)
        inverse_TK, top_k = inverse_S.view_as(ids_TK), ids_TK.shape[1]
        douts = Rows(dout, order_S, top_k, inverse_TK) if ctx.combine else Rows(dout)

        dz_SN = torch.empty_like(z_SN) if _graph_is_kept() else z_SN
        dscales_S = torch.zeros(
            scales_S.shape, dtype=sum_dtype(z_SN.dtype), device=z_SN.device
        )  # stays so for sentinels
        scaled_SI = None
        if need_down.weight or need_down.lora_a:
            scaled_SI = z_SN.new_empty((z_SN.shape[0], w2.shape[1]))
        lows = []
        for span, ends_E in _spans(w2, offsets_E, order_S):
            part = douts.part(span)
            da_SI, dlow_SR = project_back(part, down, ends_E)
            lows.append(dlow_SR)
            if not (need_down.weight or need_down.lora_b):
                part.release()
            gate_backward(
                ctx.gate, _part(z_SN, span), b1, da_SI, scales_S, _part(order_S, span), ends_E, _part(dz_SN, span),
                dscales_S, None if scaled_SI is None else _part(scaled_SI, span),
            )  # fmt: skip
            del part, da_SI
        low2 = Low(low2_SR, _joined([low for low in lows if low is not None]) if c2 is not None else None)
        ddown = parameter_grads(scaled_SI, douts, down, need_down, low2, offsets_E, scales_S, order_S)
        del scaled_SI, douts
        dweights_TK = None
        if need_weights and ctx.combine:
            dweights_TK = dscales_S.view_as(weights_TK)
            if b2 is not None:
                dweights_TK = dweights_TK + _bias_dots(dout, b2, ids_TK)
            dweights_TK = dweights_TK.to(weights_TK.dtype)
        dzs = Rows(dz_SN)
        dx_TH = dlow_SR = None
        if need_x:
            dx_SH, dlow_SR = project_back(dzs, up, offsets_E)
            dx_TH = combine_rows(dx_SH, inverse_TK, offsets_E)
            del dx_SH
        elif need_up.lora_a:
            dlow_SR = low_back(dzs, up, offsets_E)
        rows, low1 = Rows(x_TH, order_S, top_k, inverse_TK), Low(low1_SR, dlow_SR)
        dup = parameter_grads(rows, dzs, up, need_up, low1, offsets_E)
        return dx_TH, dweights_TK, *dup, *ddown, None, None, None, None


def _spans(w2_EIH: Tensor, offsets_E: Tensor, order_S: Tensor) -> list[tuple[slice, Tensor]]:
    """The rows to take through the activation at a time, and the experts' ends among them.

    All of them, unless a is much wider than x: then, with 3·I of memory a row at the peak, two halves save a quarter
    (Mixtral at T = 8192: 1.3 instead of 1.6 GB).
    """
    size, (_, inner, width) = order_S.numel(), w2_EIH.shape
    if inner <= 2 * width or size < 4096:
        return [(slice(0, size), offsets_E)]
    half = size // 2
    return [(slice(start, end), (offsets_E - start).clamp(0, end - start)) for start, end in ((0, half), (half, size))]


def _part(tensor: Tensor, span: slice) -> Tensor:
    return tensor if span == slice(0, tensor.shape[0]) else tensor[span]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _graph_is_kept() -> bool:
    """Whether this backward may run again (``retain_graph=True``), so that what it saved must not be overwritten."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else bool(asked())


def _bias_dots(dout_TH: Tensor, b2_EH: Tensor, ids_TK: Tensor) -> Tensor:
    """⟨dO, b2⟩ of each slot: one small product with all experts, then a choice. fp32, or fp64 for fp64 input."""
    if dout_TH.is_cuda and dout_TH.dtype in (torch.bfloat16, torch.float16):
        dots_TE = torch.mm(dout_TH, b2_EH.t(), out_dtype=torch.float32)
    else:
        precise = sum_dtype(dout_TH.dtype)
        dots_TE = dout_TH.to(precise) @ b2_EH.t().to(precise)
    experts = b2_EH.shape[0]
    dots_TK = dots_TE.gather(1, ids_TK.clamp(0, experts - 1).long())
    return torch.where((ids_TK >= 0) & (ids_TK < experts), dots_TK, 0.0)
