"""A tokenizer, ragged texts and tiny trainers for the tests of the TRL adapter."""

from __future__ import annotations

from typing import Any

import datasets
import torch
import transformers
import trl
from hf_helpers import DEFAULTS, VOCABULARY, documents, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

import fastft_trl

CHAT_TEMPLATE = (
    "{% for message in messages %}w3 {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' w2 ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' w4 ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each of the words w0, w1, ..."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")
    made.chat_template = CHAT_TEMPLATE
    return made


def text(row: dict[str, list[int]]) -> str:
    return " ".join(f"w{token}" for token in row["input_ids"])


def tokens() -> datasets.Dataset:
    return datasets.Dataset.from_list(documents())


def completions() -> datasets.Dataset:
    rows = [{**row, "completion_mask": [0] + [1] * (len(row["input_ids"]) - 1)} for row in documents()]
    return datasets.Dataset.from_list(rows)


def conversations() -> datasets.Dataset:
    rows = [text(row) for row in documents(96, longest=9)]
    roles = ("user", "assistant")
    return datasets.Dataset.from_list(
        [
            {
                "messages": [
                    {"role": role, "content": content} for role, content in zip(roles * 2, rows[at:], strict=False)
                ]
            }
            for at in range(0, 88, 2)
        ]
    )


def preferences() -> datasets.Dataset:
    prompts, chosen, rejected = (map(text, documents(16, 3, 9, seed=seed)) for seed in range(3))
    rows = zip(prompts, chosen, rejected, strict=True)
    return datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


def arguments(folder: Any, **overrides: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), **DEFAULTS, "bf16": False} | overrides


def sft_trainer(folder: Any, data: datasets.Dataset, *, callbacks: Any = (), **overrides: Any) -> trl.SFTTrainer:
    options = {"gradient_checkpointing": False, "max_length": 64} | overrides
    return trl.SFTTrainer(
        tiny_model("qwen3"),
        fastft_trl.SFTConfig(**arguments(folder, **options)),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


def dpo_trainer(folder: Any, **overrides: Any) -> trl.DPOTrainer:
    return trl.DPOTrainer(
        tiny_model("qwen3"),
        ref_model=tiny_model("qwen3"),
        args=fastft_trl.DPOConfig(**arguments(folder, **overrides)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )


def grpo_trainer(folder: Any, **overrides: Any) -> trl.GRPOTrainer:
    options = {"num_generations": 2, "max_completion_length": 4, "max_steps": 3} | overrides
    return trl.GRPOTrainer(
        tiny_model("qwen3"),
        reward_funcs=lambda completions, **kwargs: [float(len(set(one.split()))) for one in completions],
        args=fastft_trl.GRPOConfig(**arguments(folder, **options)),
        train_dataset=preferences().select_columns(["prompt"]),
        processing_class=tokenizer(),
    )


def kto_trainer(folder: Any, **overrides: Any) -> trl.KTOTrainer:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": index % 2 == 0}
        for index, row in enumerate(preferences())
    ]
    return trl.KTOTrainer(
        tiny_model("qwen3"),
        ref_model=tiny_model("qwen3"),
        args=fastft_trl.KTOConfig(**arguments(folder, **overrides)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def reward_trainer(folder: Any, **overrides: Any) -> trl.RewardTrainer:
    torch.manual_seed(0)
    config = tiny_model("qwen3").config
    config.num_labels, config.pad_token_id = 1, 0
    return trl.RewardTrainer(
        transformers.Qwen3ForSequenceClassification(config),
        args=fastft_trl.RewardConfig(**arguments(folder, **overrides)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
