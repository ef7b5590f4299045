"""LoRA on the experts of a mixture-of-experts model: PEFT's setting, and nothing of ours but the callback. On a GPU the
callback needs no setting; here it is forced, because a CPU has nothing to win by it."""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from tiny import ROWS, pad
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

from fastft_plugins import FastFTCallback

torch.manual_seed(0)
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=97, use_cache=False,
    )
)  # fmt: skip
# The weights of all experts are one parameter, which target_modules does not reach.
lora = LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)  # fmt: skip
model = get_peft_model(model, lora)
callback = FastFTCallback({"moe": "on"})
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=4, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model, arguments, data_collator=pad, train_dataset=ROWS, callbacks=[callback]).train()
assert callback.report.features["moe"].enabled
print(callback.report)
