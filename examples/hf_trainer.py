"""Hugging Face Trainer: one callback."""

from __future__ import annotations

import tempfile

from tiny import ROWS, pad, tiny_model
from transformers import Trainer, TrainingArguments

from fastft_plugins import FastFTCallback

callback = FastFTCallback()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=4, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(tiny_model(), arguments, data_collator=pad, train_dataset=ROWS, callbacks=[callback])
    trainer.train()
print(callback.report)
