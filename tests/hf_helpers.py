"""Tiny models, ragged data and padding collators for the tests of the transformers adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

VOCABULARY = 97
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 5}),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
}


def tiny_model(family: str = "llama", **overrides: Any) -> transformers.PreTrainedModel:
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        initializer_range=0.2,  # large enough for attention to matter
        **(extra | overrides),
    )
    return model_class(config)


def documents(count: int = 48, shortest: int = 2, longest: int = 24, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


class Pad:
    """An ordinary padding collator, as users write them."""

    def __init__(self, side: str = "right", mask_prompt: int = 0) -> None:
        self.side, self.mask_prompt = side, mask_prompt

    def __call__(self, features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for feature in features:
            ids = feature["input_ids"]
            masked = min(self.mask_prompt, len(ids))
            rows = {
                "input_ids": (ids, 0),
                "attention_mask": ([1] * len(ids), 0),
                "labels": ([-100] * masked + ids[masked:], -100),
            }
            for name, (row, pad) in rows.items():
                padding = [pad] * (longest - len(ids))
                columns[name].append(row + padding if self.side == "right" else padding + row)
        return {name: torch.tensor(rows) for name, rows in columns.items()}


class Gradients(TrainerCallback):
    """Keeps every gradient as it is just before each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


DEFAULTS: dict[str, Any] = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "optim": "sgd",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}


def make_trainer(
    folder: Path | str,
    model: torch.nn.Module,
    *,
    collator: Any = None,
    callbacks: Any = (),
    data: Any = None,
    trainer_class: type[Trainer] = Trainer,
    trainer_options: dict[str, Any] | None = None,
    **overrides: Any,
) -> Trainer:
    """A Trainer around a copy of ``model``."""
    return trainer_class(
        copy.deepcopy(model),
        TrainingArguments(str(folder), **(DEFAULTS | overrides)),
        data_collator=collator or Pad(),
        train_dataset=documents() if data is None else data,
        callbacks=list(callbacks),
        **(trainer_options or {}),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def grad_norms(trainer: Trainer) -> list[float]:
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
