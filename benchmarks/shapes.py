"""Models of real shapes with random weights: nothing is downloaded, and a 14B model is ready in seconds on a GPU."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from benchmarks.settings import Settings


def _llama(hidden: int, mlp: int, layers: int, head_dim: int, rope_factor: float, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }


_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": _llama(2048, 8192, 16, head_dim=64, rope_factor=32.0, tied=True),
    "llama-8b": _llama(4096, 14336, 32, head_dim=128, rope_factor=8.0, tied=False),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, heads=16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, heads=32, tied=True),
    "qwen3-14b": _qwen3(5120, 17408, 40, heads=40, tied=False),
    "qwen3-32b": _qwen3(5120, 25600, 64, heads=64, tied=False),
    "qwen3-30b-a3b": {
        **_qwen3(2048, 6144, 48, heads=32, tied=False),
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
    # The defaults of gpt_oss's config are those of gpt-oss-120b.
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-qwen3": {"model_type": "qwen3", **_TINY},
}


def vocab_size(shape: str) -> int:
    values = SHAPES[shape]
    return int(AutoConfig.for_model(**values).vocab_size)


def build_model(settings: Settings, attention: str | None = None, **overrides: Any) -> torch.nn.Module:
    """The shape's stock model, on the device, in training mode, with LoRA adapters if asked for.

    Attention is sdpa, or eager where the model has sinks, which sdpa lacks, unless a name is given. ``overrides`` are
    values of the model's config.
    """
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
        if settings.trainable == "lora":
            model = _with_lora(model, fp32=settings.dtype == "fp16")
    return model.train()


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

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    # Adapters in the model's dtype: in fp32, which the loss scaling of fp16 needs, they make every stack cast its
    # activations twice a layer.
    adapted: torch.nn.Module = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    return adapted
