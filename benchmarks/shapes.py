"""Models of real shapes with random weights: nothing is downloaded, and a 14B model is ready in seconds on a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from benchmarks.settings import Settings
from fastft_plugins.shapes import SHAPES

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}  # on all linears


def vocab_size(shape: str) -> int:
    values = SHAPES[shape]
    return int(AutoConfig.for_model(**values).vocab_size)


def build_model(settings: Settings, attention: str | None = None, **overrides: Any) -> torch.nn.Module:
    """The shape's stock model, on the device, in training mode, with LoRA adapters if asked for.

    Attention is sdpa, or eager where the model has sinks, which sdpa lacks, unless a name is given. ``overrides`` are
    values of the model's config.
    """
    if settings.weights is not None:
        model = _loaded(settings, attention)
    else:
        model = _made(settings, attention, **overrides)
    if settings.trainable == "lora":
        with settings.torch_device():
            model = _with_lora(model, fp32=settings.dtype == "fp16")
    return model.train()


def _made(settings: Settings, attention: str | None, **overrides: Any) -> torch.nn.Module:
    values = SHAPES[settings.shape] | overrides
    if settings.layers is not None:
        values["num_hidden_layers"] = settings.layers
    config = AutoConfig.for_model(**values)
    config.use_cache = False
    attention = attention or ("eager" if config.model_type == "gpt_oss" else "sdpa")
    torch.manual_seed(settings.seed)
    # On the device at once: drawing billions of numbers on the host would take minutes.
    with settings.torch_device():
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=settings.torch_dtype(), attn_implementation=attention
        )
    return model


def _loaded(settings: Settings, attention: str | None) -> torch.nn.Module:
    torch.manual_seed(settings.seed)  # of the adapters
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        settings.weights,
        dtype=settings.torch_dtype(),
        attn_implementation=attention,
        device_map={"": settings.torch_device()},
    )
    return model


def enable_checkpointing(
    model: torch.nn.Module, checkpoint_options: dict[str, Any] | None = None, **options: Any
) -> None:
    """Checkpoint the layers, under whichever name the installed transformers has for it.

    Args:
        checkpoint_options: keywords of torch's checkpoint; by default ``{"use_reentrant": False}``.
        options: transformers' own, ``every_n_layers`` and ``offload``.
    """
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)(checkpoint_options, **options)
            return
    raise TypeError(f"{type(model).__name__} cannot checkpoint its activations")


def checkpointing_argument() -> str:
    """The name TrainingArguments has for it: newer transformers deprecates gradient_checkpointing."""
    names = inspect.signature(TrainingArguments).parameters
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _with_lora(model: torch.nn.Module, fp32: bool) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    # Adapters in the model's dtype: in fp32, which the loss scaling of fp16 needs, they make every stack cast its
    # activations twice a layer.
    adapted: torch.nn.Module = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    return adapted
