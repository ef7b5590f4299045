"""TRL: one flag in the config. The trainer is TRL's own."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from tiny import ROWS, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from fastft_trl import SFTConfig, report_of

words = models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w1")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w2")
with tempfile.TemporaryDirectory() as folder:
    config = SFTConfig(
        folder, fastft=True, fastft_config={"packing": "on"}, max_steps=8, per_device_train_batch_size=8,
        learning_rate=1e-2, logging_steps=4, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(tiny_model(), config, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    trainer.train()
print(report_of(trainer))
