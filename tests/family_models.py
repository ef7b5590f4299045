"""A tiny model of every causal language model that transformers ships, made from its config class alone.

Sizes are set by the names that configs share, so a family that transformers adds shows up here by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastft_hf.families import FAMILIES

VOCABULARY = 97
_MOST_PARAMETERS = 1_500_000
_WIDTH = 32

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "layers", "decoder_layers", "num_decoder_layers"), 3
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 5),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("router_aux_loss_coef", "aux_loss_coef"), 0.3),  # large enough for a wrong one to be noticed
    "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "rotary_dim": 4,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "initializer_range": 0.2,  # large enough for attention to matter
    "attn_logit_softcapping": 2.0,  # small enough for a missing one to be noticed
    "layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_sliding_window": False,
    "output_router_logits": True,
    "no_rope_layers": [1, 0, 1],
    "is_decoder": True,
}

# Heads that share no keys, and a rotary part of its own width.
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_INDEXED = {**_LATENT, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_CONV = {"layer_types": ["full_attention", "conv", "full_attention"]}
# The router logits of these are lost in transformers 5.17, and its own loss fails on them.
_NO_ROUTER_LOGITS = {"output_router_logits": False}
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4", "dots3_note_text"), _INDEXED),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "minimax"), _LINEAR),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _CONV),
    **dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoeshared"), _NO_ROUTER_LOGITS),
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0] * 2},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["full_attention", "mamba", "mamba"]},
    "llama4_text": {"attention_chunk_size": 8},
    "longcat_flash": {**_LATENT, "num_layers": 2},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def causal_lm_classes() -> dict[str, type[transformers.PreTrainedModel]]:
    """The class behind each model type that `AutoModelForCausalLM` can make, by the type in its own config."""
    classes = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        model_class = getattr(transformers, name)
        classes.setdefault(model_class.config_class.model_type, model_class)
    return classes


def tiny_family(model_type: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A model with layers of every kind that the table lists for it, and no weight left at 0 or 1.

    Raises:
        Exception: whatever the config or the model raises where these sizes do not fit it.
    """
    model_class = causal_lm_classes()[model_type]
    config = _tiny_config(model_type, model_class.config_class, overrides)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"{model_type}: {parameters:,} parameters are left; add the sizes that its config uses")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # scales of norms, biases and sinks start at 0 or 1, where mistakes hide
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def _tiny_config(model_type: str, config_class: type, overrides: dict[str, Any]) -> transformers.PreTrainedConfig:
    default = config_class()
    sizes = {name: value for name, value in _SIZES.items() if _has(default, name)}
    sizes.update({name: 0.0 for name, value in default.to_dict().items() if _is_random(name, value)})
    kinds = sorted(FAMILIES[model_type].layers) if model_type in FAMILIES else []
    kinds = kinds or sorted(set(getattr(default, "layer_types", None) or []))
    if kinds and _has(default, "layer_types"):
        layers = _SPECIAL.get(model_type, {}).get("num_hidden_layers", 3)
        sizes["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    if kinds and "sliding_attention" in kinds and _has(default, "use_sliding_window"):
        sizes.update(use_sliding_window=True, max_window_layers=1)
    return config_class(**{**sizes, **_SPECIAL.get(model_type, {}), **overrides})


def _has(config: transformers.PreTrainedConfig, name: str) -> bool:
    """Whether the config stores a value of this name; a property computes it from others, and cannot be set."""
    return name in config.to_dict() or name in config.attribute_map


def _is_random(name: str, value: Any) -> bool:
    return isinstance(value, float) and ("drop" in name or "jitter" in name)
