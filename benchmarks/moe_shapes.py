"""Mixture-of-experts blocks of real shapes with random weights, each from a stock causal LM of one layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 0, "intermediate_size": 256,
    },
    "tiny-qwen3-moe": {
        "model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip

CASES = [
    ("qwen3-30b-a3b", 32768, "frozen"),
    ("qwen3-30b-a3b", 8192, "frozen"),
    ("qwen3-30b-a3b", 32768, "trained"),
    ("gpt-oss-20b", 32768, "frozen"),
    ("gpt-oss-20b", 32768, "trained"),
    ("mixtral-8x7b", 8192, "frozen"),
    ("deepseek-v3", 8192, "frozen"),
    ("qwen3-30b-a3b", 8192, "lora"),
]


@dataclass
class Block:
    """A block, its input, and the gradient of its output."""

    model: nn.Module
    block: nn.Module
    experts: Any  # the experts module itself, below PEFT's wrappers
    top_k: int
    x: Tensor
    dout: Tensor

    def step(self) -> None:
        out = self.block(self.x)
        (out[0] if isinstance(out, tuple) else out).backward(self.dout)

    def forget_grads(self) -> None:
        self.model.zero_grad()
        self.x.grad = None

    def force(self, ids_TK: Tensor) -> None:
        """Route to these experts, whatever the router chooses; its weights stay."""
        self.experts.register_forward_pre_hook(lambda module, args: (args[0], ids_TK, *args[2:]))

    @contextlib.contextmanager
    def running(self, stack: str) -> Iterator[str]:
        """Within the block, steps run "stock" (grouped_mm), "eager", "fastft" or a registered peer.

        Yields fastft's report.
        """
        from fastft_plugins import apply

        if stack == "fastft":
            with apply(self.model, {"moe": "on", "packing": "off", "checkpointing": "off"}) as run:
                yield str(run.report)
            return
        config, before = self.experts.config, self.experts.config._experts_implementation
        config._experts_implementation_internal = before if stack == "stock" else stack
        try:
            yield ""
        finally:
            config._experts_implementation_internal = before


def build_block(shape: str, tokens: int, mode: str, device: torch.device) -> Block:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**_ATTENTION, **SHAPES[shape]}
    if shape == "deepseek-v3":
        del values["head_dim"]
    config = AutoConfig.for_model(**values, num_hidden_layers=1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    (name, experts), *_ = [(name, each) for name, each in model.named_modules() if hasattr(each, "has_gate")]
    for parameter in experts.parameters():
        parameter.requires_grad_(mode == "trained")
    if mode == "lora":
        model = _with_lora(model)
    block = model.get_submodule(("base_model.model." if mode == "lora" else "") + name.rpartition(".")[0])
    x = torch.randn(1, tokens, values["hidden_size"], device=device, dtype=dtype, requires_grad=True)
    return Block(model, block, experts, values["num_experts_per_tok"], x, torch.randn_like(x))


def skewed_ids(block: Block, tokens: int) -> Tensor:
    """One expert takes 30 % of the rows, the others share the rest; an expert may come twice in a token's choice."""
    generator = torch.Generator(block.x.device).manual_seed(0)
    size = (tokens, block.top_k)
    ids_TK = torch.randint(1, block.experts.num_experts, size, device=block.x.device, generator=generator)
    hot_TK = torch.rand(size, device=block.x.device, generator=generator) < 0.3
    return ids_TK.masked_fill(hot_TK, 0)


def _with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return adapted
