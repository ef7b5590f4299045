"""Whether a model can train on packed rows exactly as it does on padded ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastft_hf import foreign
from fastft_hf.classes import written_class
from fastft_hf.families import FAMILIES, Family
from fastft_hf.own_attention import is_own
from fastft_hf.stand_in import StandInConfig, stock_config

# Attention implementations whose results packed attention reproduces.
_IMPLEMENTATIONS = ("sdpa", "eager")
# Packages whose modules pass batches and losses on as they are: adapters, data parallelism, compilation.
_KNOWN_WRAPPERS = ("peft", "torch", "accelerate", "transformers")
# Rotary embeddings whose angles depend on the longest row of the padded batch.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
# The names under which models know transformers' functions for masks.
_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")
_RANDOM = "what it draws at random depends on the padding, packed attention has no dropout"


def family_of(causal_lm: PreTrainedModel) -> Family:
    """What is known about the model's type; an unknown one has no layers that can be packed."""
    model_type = causal_lm.config.model_type
    return FAMILIES.get(model_type, Family(reason=f"model type '{model_type}' is not among the tested ones"))


def why_not(model: nn.Module, causal_lm: PreTrainedModel) -> str | None:
    """The reason why ``causal_lm``, inside ``model``, cannot be packed exactly, or None."""
    return (
        _why_not_class(causal_lm)
        or why_not_kinds(causal_lm)
        or why_not_config(causal_lm.config)
        or _why_not_wrapper(model)
        or why_not_code(causal_lm)
        or foreign.layer(causal_lm.modules())
    )


def why_not_code(causal_lm: PreTrainedModel) -> str | None:
    """The reason if somebody else's code may change the loss of ``causal_lm`` itself, or its batch; quick to find."""
    home = foreign.foreign_home(causal_lm.loss_function)
    if home is not None:
        return f"{type(causal_lm).__name__} has a loss function of {home}, which may not be a sum over tokens"
    return foreign.replaced_forward([causal_lm]) or foreign.forward_hook([causal_lm])


def why_not_attention(causal_lm: PreTrainedModel, attentions: Sequence[nn.Module]) -> str | None:
    """The reason why these layers of ``causal_lm`` cannot be served, or None."""
    name = type(causal_lm).__name__
    if not attentions:
        return f"no layer of {name} takes its attention from transformers' interface"
    for attention in attentions:
        config: Any = attention.config
        if isinstance(config, StandInConfig):
            return f"another run, on a module around {name} or inside it, packs its attention; use that run, or end it"
        for attribute, value in (*vars(attention).items(), *attention.named_children()):
            rate = value.p if isinstance(value, nn.Dropout) else value
            if "drop" in attribute and isinstance(rate, float) and rate > 0:
                return f"{attribute} of {type(attention).__name__} is {rate}; {_RANDOM}"
    return foreign.replaced_forward(holders_of(causal_lm, attentions))


def holders_of(causal_lm: PreTrainedModel, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """The model and the parts of it that hold attention, which see whole rows.

    It is common, and harmless, to replace what treats each token by itself.
    """
    wanted = set(attentions)
    return [module for module in causal_lm.modules() if wanted & set(module.modules())]


def attention_function(attention: nn.Module, implementation: str) -> Any:
    """The function of this name in transformers' registry; "eager" is the one beside the layer's class."""
    eager = getattr(_beside(attention), "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def attention_functions(attention: nn.Module) -> tuple[Any, ...]:
    """The functions that decide stock's result for a layer: its attention, and those for the mask it is given."""
    module = _beside(attention)
    function = attention_function(attention, stock_config(attention)._attn_implementation)
    return function, *(getattr(module, name, None) for name in _MASKS)


def _beside(attention: nn.Module) -> Any:
    """The Python module in which the layer's class is written."""
    return sys.modules[written_class(attention).__module__]


def layer_kinds(config: Any) -> frozenset[str]:
    """The kinds of layer that a config asks for, in transformers' words: "full_attention", "sliding_attention", ..."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return frozenset(kinds)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return frozenset({"sliding_attention" if windowed else "full_attention"})


def _why_not_class(causal_lm: PreTrainedModel) -> str | None:
    written = written_class(causal_lm)
    name, family = written.__name__, family_of(causal_lm)
    if not family.layers:
        return f"{name}: {family.reason}"
    if not written.__module__.startswith("transformers.models."):
        return f"{name} is not transformers' own class, so its forward and loss are unknown"
    if hasattr(causal_lm, "_loss_function") or getattr(causal_lm, "loss_type", None) != "ForCausalLM":
        return f"{name} has a loss function of its own, which may not be a sum over tokens"
    return None


def why_not_kinds(causal_lm: PreTrainedModel) -> str | None:
    """The reason if the config asks for a kind of layer that is not tested for the model's type."""
    untested = layer_kinds(causal_lm.config) - family_of(causal_lm).layers
    if untested:
        return f"layers of the kind '{min(untested)}' are not tested for model type '{causal_lm.config.model_type}'"
    return None


def why_not_config(config: Any) -> str | None:
    """The reason if a setting in a model's config is one that packed rows do not honour."""
    implementation = config._attn_implementation
    if implementation not in _IMPLEMENTATIONS and not is_own(ALL_ATTENTION_FUNCTIONS.get(implementation)):
        known = "'sdpa', 'eager', 'flex_attention' and FlashAttention through transformers' function for it"
        return f"attention implementation '{implementation}' is kept; packing serves {known}"
    for name, value in sorted(config.to_dict().items()):
        is_random = ("drop" in name or "jitter" in name) and not name.startswith(("classifier", "summary"))
        if is_random and isinstance(value, float) and value > 0:
            return f"{name} is {value}; {_RANDOM}"
    if getattr(config, "output_attentions", False):
        return "output_attentions is set; packed attention never forms the attention weights"
    if not getattr(config, "is_causal", True):
        return "is_causal is False in the model's config; packed attention is causal"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "use_bidirectional_attention is set in the model's config; packed attention is causal"
    for parameters in _rope_parameters(config):
        rope_type = parameters.get("rope_type", "default")
        if rope_type in _BATCH_DEPENDENT_ROPE:
            return f"'{rope_type}' rotary embedding depends on the longest row of the padded batch"
    return None


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """One dict for the model, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def around_of(model: nn.Module, causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The modules of ``model`` that hold ``causal_lm``."""
    return [module for module in model.modules() if module is not causal_lm and causal_lm in set(module.modules())]


def why_not_inside(around: Sequence[nn.Module]) -> str | None:
    """The reason if one of these modules around a model may compute a loss, or change the batch, in its own way."""
    for module in around:
        written = written_class(module)
        if written.__module__.split(".")[0] not in _KNOWN_WRAPPERS:
            return f"{written.__name__} around the model may have a loss of its own that is no sum over tokens"
    return foreign.replaced_forward(around) or foreign.forward_hook(around)


def _why_not_wrapper(model: nn.Module) -> str | None:
    for module in model.modules():
        adapters = getattr(module, "peft_config", None)
        for adapter in adapters.values() if isinstance(adapters, dict) else ():
            if getattr(adapter, "is_prompt_learning", False):
                return "PEFT prompt learning puts virtual tokens before each row"
            if getattr(adapter, "alora_invocation_tokens", None):
                return "PEFT's activated LoRA looks for its invocation once in each row"
    if isinstance(model, nn.DataParallel):
        return "DataParallel splits batches by rows, and a packed batch has one"
    return None
