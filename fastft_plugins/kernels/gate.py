"""The experts' activation between their two projections: a = act(z + b), and its backward.

Shape suffixes: S routed rows, E experts, I intermediate width, N width of z (2·I, or I without a gate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft_plugins.kernels.dispatch import Kernel, choose
from fastft_plugins.kernels.triton_support import TensorCall, triton_kernel, triton_rejects

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
GATED = (*ACTIVATIONS, "clamped_swiglu", "limited_silu")


@dataclass(frozen=True)
class Gate:
    """An activation that the kernels know, or, with kind "other", one that only ``function`` knows.

    Attributes:
        kind: one of `GATED`; of `ACTIVATIONS` where the layout is "ungated"; or "other".
        layout: how z holds gate and up: "concatenated", "interleaved", or "ungated" if z is the activation's input.
        alpha: of "clamped_swiglu" (gpt-oss): (up + 1) · gate · sigmoid(alpha · gate), both clamped.
        limit: of "clamped_swiglu" and "limited_silu": gate is clamped from above, up from both sides.
        function: z ``[S, N]`` → a ``[S, I]``, differentiable, for kind "other".
    """

    kind: str
    layout: str
    alpha: float = 0.0
    limit: float = 0.0
    function: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    def __call__(self, z_SN: Tensor) -> Tensor:
        """a, written out in torch."""
        if self.function is not None:
            return self.function(z_SN)
        if self.layout == "ungated":
            return ACTIVATIONS[self.kind](z_SN)
        gate, up = (z_SN[..., ::2], z_SN[..., 1::2]) if self.layout == "interleaved" else z_SN.chunk(2, -1)
        if self.kind in ("clamped_swiglu", "limited_silu"):
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.kind == "clamped_swiglu":
            return (up + 1) * gate * torch.sigmoid(self.alpha * gate)
        return ACTIVATIONS["silu" if self.kind == "limited_silu" else self.kind](gate) * up


@dataclass(frozen=True)
class GateCall(TensorCall):
    """What decides which kernel can serve a gate."""

    kind: str


def gate_forward(gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, order_S: Tensor, offsets_E: Tensor) -> Tensor:
    """a = act(z + b of the row's expert), ``[S, I]``; in fp32 inside where the kind is known.

    Rows at or beyond ``offsets_E[-1]`` belong to sentinels; theirs may hold anything.
    """
    run = choose("gate_forward", GateCall(z_SN.device, z_SN.dtype, gate.kind)).kernel.run
    a_SI: Tensor = run(gate, z_SN, bias_EN, order_S, offsets_E)
    return a_SI


def gate_backward(
    gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, da_SI: Tensor, weights_S: Tensor, order_S: Tensor,
    offsets_E: Tensor, dz_SN: Tensor, dweights_S: Tensor, scaled_SI: Tensor | None,
) -> None:  # fmt: skip
    """The backward of s · (a @ W2) through a, given ``da_SI`` = dO @ W2ᵀ without the routing weight s.

    ``weights_S`` holds s by slot (token · K + k), ``order_S`` the slot of each row. Written are:
        ``dz_SN``: act'(z + b) · (s · da); it may be ``z_SN`` itself.
        ``dweights_S``: fp32 (fp64 for fp64 input), at the slot of each row, ds = ⟨da, a⟩; untouched for sentinels.
        ``scaled_SI``: s · a, if given.
    """
    run = choose("gate_backward", GateCall(z_SN.device, z_SN.dtype, gate.kind)).kernel.run
    run(gate, z_SN, bias_EN, da_SI, weights_S, order_S, offsets_E, dz_SN, dweights_S, scaled_SI)


def _input(gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, offsets_E: Tensor) -> Tensor:
    if gate.kind != "other" and z_SN.dtype != torch.float64:
        z_SN = z_SN.float()
    if bias_EN is None:
        return z_SN
    place_S = torch.arange(z_SN.shape[0], dtype=offsets_E.dtype, device=z_SN.device)
    expert_S = torch.searchsorted(offsets_E, place_S, right=True).clamp(max=bias_EN.shape[0] - 1)
    return z_SN + bias_EN.index_select(0, expert_S).to(z_SN.dtype)


def reference_gate_forward(
    gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, order_S: Tensor, offsets_E: Tensor
) -> Tensor:
    return gate(_input(gate, z_SN, bias_EN, offsets_E)).to(z_SN.dtype)


def reference_gate_backward(
    gate: Gate, z_SN: Tensor, bias_EN: Tensor | None, da_SI: Tensor, weights_S: Tensor, order_S: Tensor,
    offsets_E: Tensor, dz_SN: Tensor, dweights_S: Tensor, scaled_SI: Tensor | None,
) -> None:  # fmt: skip
    with torch.enable_grad():
        input_SN = _input(gate, z_SN.detach(), bias_EN, offsets_E).detach().requires_grad_()
        a_SI = gate(input_SN)
        scale_S1 = weights_S.index_select(0, order_S)[:, None].to(a_SI.dtype)
        (dinput_SN,) = torch.autograd.grad(a_SI, input_SN, scale_S1 * da_SI.to(a_SI.dtype))
    a_SI = a_SI.detach()
    dot_S = (a_SI.to(dweights_S.dtype) * da_SI).sum(1)
    place_S = torch.arange(dot_S.numel(), device=dot_S.device)
    slot_S = order_S.long()
    # The rows of sentinels hold anything.
    dweights_S[slot_S] = torch.where(place_S < offsets_E[-1], dot_S, dweights_S[slot_S])
    if scaled_SI is not None:
        scaled_SI.copy_(scale_S1 * a_SI)
    dz_SN.copy_(dinput_SN)


def _triton_rejects(call: GateCall) -> str | None:
    if call.kind == "other":
        return "the model's activation is not one the kernel knows"
    return triton_rejects(call)


GATE_FORWARD_KERNELS = (
    Kernel("Triton", 0, _triton_rejects, triton_kernel("gate", "gate_forward")),
    Kernel("reference", 100, lambda call: None, reference_gate_forward),
)
GATE_BACKWARD_KERNELS = (
    Kernel("Triton", 0, _triton_rejects, triton_kernel("gate", "gate_backward")),
    Kernel("reference", 100, lambda call: None, reference_gate_backward),
)
