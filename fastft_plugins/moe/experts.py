"""The function that takes the place of the experts' forward in transformers' models.

Shape suffixes: T tokens, H hidden width, K experts of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastft_plugins.moe import load
from fastft_plugins.moe.function import autocast_off, run_experts
from fastft_plugins.moe.gates import gate_of
from fastft_plugins.moe.projection import Projection
from fastft_plugins.moe.routing import Routing, route

# The two factors of LoRA on one weight, as they multiply rows: [E, in, R] and [E, R, out], the scale included.
LoraFactors = tuple[Tensor, Tensor]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def experts_forward(
    module: Any,
    hidden_TH: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    *,
    lora: Mapping[str, LoraFactors] | None = None,
) -> Tensor:
    """Each token's weighted sum over its experts.

    Args:
        module: an experts module behind transformers' experts interface: ``gate_up_proj`` or ``up_proj``, ``down_proj``
            and their biases, and the attributes ``has_gate``, ``has_bias``, ``is_transposed``, ``is_concatenated``.
        hidden_TH: ``[T, H]``.
        top_k_index_TK: ``[T, K]`` integers; ids of ``num_experts`` and above contribute nothing.
        top_k_weights_TK: ``[T, K]``.
        lora: factors by the name of the weight they adapt.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_TH``. Under autocast the products are computed in autocast's dtype.

    Raises:
        ValueError: naming the tensor, its shape or dtype, and what is needed.
    """
    up, down = _projections(module, lora or {})
    _check(hidden_TH, top_k_index_TK, top_k_weights_TK, up)
    top_k_index_TK, top_k_weights_TK = top_k_index_TK.contiguous(), top_k_weights_TK.contiguous()
    routing = route(top_k_index_TK, module.num_experts)
    load.remember(module, routing.counts)
    dtype = up.weight.dtype
    if torch.is_autocast_enabled(hidden_TH.device.type) and dtype != torch.float64:  # as torch's own products do
        dtype = torch.get_autocast_dtype(hidden_TH.device.type)
    up, down = up.to(dtype), down.to(dtype)
    x_TH, gate = hidden_TH.to(dtype).contiguous(), gate_of(module)
    with autocast_off(hidden_TH.device.type):
        if getattr(module, "has_post_expert_norm", False):
            rows_SH = run_experts(x_TH, top_k_weights_TK, top_k_index_TK, routing, gate, up, down, combine=False)
            out_TH = _combine_normed(module, rows_SH, top_k_index_TK, top_k_weights_TK, routing)
        else:
            out_TH = run_experts(x_TH, top_k_weights_TK, top_k_index_TK, routing, gate, up, down)
    return out_TH.to(hidden_TH.dtype)


def _projections(module: Any, lora: Mapping[str, LoraFactors]) -> tuple[Projection, Projection]:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    projections = []
    for name in (first, "down_proj"):
        weight = getattr(module, name)
        weight = weight if module.is_transposed else weight.transpose(1, 2)
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        projections.append(Projection(weight, bias, *lora.get(name, (None, None))))
    return projections[0], projections[1]


def _combine_normed(
    module: Any, rows_SH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, routing: Routing
) -> Tensor:
    """The weighted sum where a norm stands between the second projection and it, differentiated by autograd."""
    tokens, top_k = top_k_index_TK.shape
    local_TK1 = ((top_k_index_TK >= 0) & (top_k_index_TK < module.num_experts))[..., None]
    # The rows of sentinels hold anything: zeroed before the norm, and their result after it.
    slots_TKH = rows_SH.index_select(0, routing.inverse).view(tokens, top_k, rows_SH.shape[1])
    normed_TKH = module.post_expert_norm(torch.where(local_TK1, slots_TKH, 0.0))
    return torch.where(local_TK1, normed_TKH * top_k_weights_TK[..., None], 0.0).sum(1)


def _check(hidden_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, up: Projection) -> None:
    width = up.weight.shape[1]
    if hidden_TH.dim() != 2 or hidden_TH.shape[1] != width or not hidden_TH.dtype.is_floating_point:
        raise ValueError(
            f"hidden_TH: has shape {list(hidden_TH.shape)} and {hidden_TH.dtype}; needs floats of shape "
            f"[tokens, {width}]"
        )
    tokens = hidden_TH.shape[0]
    if top_k_index_TK.dim() != 2 or top_k_index_TK.shape[0] != tokens:
        raise ValueError(f"top_k_index_TK: has shape {list(top_k_index_TK.shape)}; needs [{tokens}, k]")
    if top_k_weights_TK.shape != top_k_index_TK.shape or not top_k_weights_TK.dtype.is_floating_point:
        raise ValueError(
            f"top_k_weights_TK: has shape {list(top_k_weights_TK.shape)} and {top_k_weights_TK.dtype}; needs floats of "
            f"the shape of top_k_index_TK, {list(top_k_index_TK.shape)}"
        )
    for name, tensor in (("top_k_index_TK", top_k_index_TK), ("top_k_weights_TK", top_k_weights_TK)):
        if tensor.device != hidden_TH.device:
            raise ValueError(f"{name}: is on {tensor.device}; needs the device of hidden_TH, {hidden_TH.device}")
