"""LoRA with PEFT: nothing changes for the switch; only the adapters are trained, on packed rows."""

from __future__ import annotations

import tempfile

from peft import LoraConfig, get_peft_model
from tiny import ROWS, pad, tiny_model
from transformers import Trainer, TrainingArguments

from fastft_plugins import FastFTCallback

model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8))
callback = FastFTCallback()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=4, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(model, arguments, data_collator=pad, train_dataset=ROWS, callbacks=[callback]).train()
model.print_trainable_parameters()
print(callback.report)
