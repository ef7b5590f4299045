"""LoRA on the experts of a mixture-of-experts model: PEFT's setting, and nothing of ours but the callback. On a GPU the
callback needs no setting; here it is forced, because a CPU has nothing to win by it."""

from __future__ import annotations

import tempfile

from peft import LoraConfig, get_peft_model
from tiny import ROWS, pad, tiny_moe_model
from transformers import Trainer, TrainingArguments

from fastft_plugins import FastFTCallback

# The weights of all experts are one parameter, which target_modules does not reach.
lora = LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)  # fmt: skip
model = get_peft_model(tiny_moe_model(), lora)
callback = FastFTCallback({"moe": "on"})
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=4, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model, arguments, data_collator=pad, train_dataset=ROWS, callbacks=[callback]).train()
assert callback.report.features["moe"].enabled
print(callback.report)
