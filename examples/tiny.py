"""A tiny random model and ragged made-up data, so that every example runs on a CPU in seconds, without a network."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.set_num_threads(1)

ROWS = [{"input_ids": [1 + (7 * row + column) % 96 for column in range(3 + row * 5 % 29)]} for row in range(64)]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=97, use_cache=False,
        )
    )  # fmt: skip


def tiny_moe_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=97, use_cache=False,
        )
    )  # fmt: skip


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """An ordinary collator: pads every row to the longest of its batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
