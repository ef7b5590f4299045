"""Experts modules of transformers, their own forward, and what the tests compare."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

KINDS = {
    "silu": ("qwen3_moe", "Qwen3MoeExperts"),
    "clamped": ("gpt_oss", "GptOssExperts"),  # interleaved, transposed, with biases
    "transposed": ("aria", "AriaExperts"),
    "ungated": ("nemotron_h", "NemotronHExperts"),
    "normed": ("muse_spark", "MuseSparkExperts"),  # a norm between the second projection and the sum
    "unknown": ("inkling2", "Inkling2Experts"),  # a gate that no kernel knows
}


def experts_class(model: str, name: str) -> Any:
    """An experts class behind transformers' interface; skips the test where the installed transformers lacks it."""
    found = getattr(pytest.importorskip(f"transformers.models.{model}.modeling_{model}"), name)
    if "experts_interface" not in inspect.getclosurevars(found.forward).nonlocals:
        pytest.skip(f"{name} does not ask the interface in transformers {transformers.__version__}")
    return found


def make_experts(
    kind: str = "silu", experts: int = 4, hidden: int = 6, inner: int = 5, dtype: torch.dtype = torch.float64
) -> Any:
    """An experts module of transformers with random weights."""
    model, name = KINDS[kind]
    config = SimpleNamespace(
        num_experts=experts, num_local_experts=experts, n_routed_experts=experts, moe_num_experts=experts,
        hidden_size=hidden, moe_hidden_size=hidden, moe_latent_size=None, intermediate_size=inner,
        moe_intermediate_size=inner, hidden_act="silu", mlp_hidden_act="relu2", swiglu_alpha=1.702, swiglu_limit=2.0,
        post_norm_eps=1e-5, mlp_gate_softcap=3.0, mlp_up_softcap=4.0, _experts_implementation="eager",
    )  # fmt: skip
    module = experts_class(model, name)(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(dtype)


def make_inputs(
    tokens: int = 11, top_k: int = 2, experts: int = 4, hidden: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and routing weights; the weights may be negative, an expert may come twice in a row."""
    ids = torch.randint(experts, (tokens, top_k))
    return torch.randn(tokens, hidden, dtype=dtype), ids, torch.randn(tokens, top_k, dtype=dtype)


def stock_forward(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The model's own loop over experts; ids beyond the experts, which not every model knows, weigh nothing."""
    local = (ids >= 0) & (ids < module.num_experts)
    forward = inspect.getclosurevars(type(module).forward).nonlocals["original_forward"]
    out: Tensor = forward(module, x, torch.where(local, ids, 0), torch.where(local, weights, 0.0))
    return out


def gradients(forward: Any, module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor | None]:
    """The output, and the gradients of x, the routing weights and every parameter that wants one."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    wanted = {"x": x, "weights": weights} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    out = forward(module, x, ids, weights)
    if not out.requires_grad:  # stock's loop over no tokens
        out = out + 0 * x
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, list(wanted.values()), dout, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True,
    "initializer_range": 0.2,
}  # fmt: skip
LATENT = {
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip


def tiny_causal_lm(family: str = "Qwen3Moe", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model with two layers of experts, in training mode."""
    torch.manual_seed(0)
    sizes = SIZES | (LATENT if family == "DeepseekV3" else {}) | overrides
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the one that serves it
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:  # zero at first, which would hide a missing one
            nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).train()
