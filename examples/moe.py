"""A mixture-of-experts model: its experts run through fastft's function. On a GPU that needs no setting; here it is
forced, because a CPU has nothing to win by it."""

from __future__ import annotations

import tempfile

from tiny import ROWS, pad, tiny_moe_model
from transformers import Trainer, TrainingArguments

from fastft_plugins import FastFTCallback

callback = FastFTCallback({"moe": "on"})
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=4, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    Trainer(tiny_moe_model(), arguments, data_collator=pad, train_dataset=ROWS, callbacks=[callback]).train()
assert callback.report.features["moe"].enabled
print(callback.report)
