"""Whether a model can train on packed rows exactly as it does on padded ones."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastft_hf.classes import written_class
from fastft_hf.families import FAMILIES, Family

# Attention implementations whose results packed attention reproduces.
_IMPLEMENTATIONS = ("sdpa", "eager")
# Packages whose modules pass batches and losses on as they are: adapters, data parallelism, compilation.
_KNOWN_WRAPPERS = ("peft", "torch", "accelerate", "transformers")
# Packages that replace a model's forward, or hook into it, and keep the loss a sum over tokens.
_KNOWN_PATCHES = (*_KNOWN_WRAPPERS, "trl", "liger_kernel", "lightning", "pytorch_lightning", "lightning_fabric")
# Rotary embeddings whose angles depend on the longest row of the padded batch.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def family_of(causal_lm: PreTrainedModel) -> Family:
    """What is known about the model's type; an unknown one has no layers that can be packed."""
    model_type = causal_lm.config.model_type
    return FAMILIES.get(model_type, Family(reason=f"model type '{model_type}' is not among the tested ones"))


def why_not(model: nn.Module, causal_lm: PreTrainedModel) -> str | None:
    """The reason why ``causal_lm``, inside ``model``, cannot be packed exactly, or None."""
    return (
        _why_not_class(causal_lm)
        or _why_not_config(causal_lm.config)
        or _why_not_wrapper(model)
        or _why_not_patched(model, causal_lm)
    )


def dropout_of(attention: nn.Module) -> float:
    """The dropout that an attention layer passes on when it trains, whatever its config says."""
    for name in ("attention_dropout", "attn_dropout", "dropout_prob", "dropout"):
        value = getattr(attention, name, None)
        rate = getattr(value, "p", value)  # a number, or a module of it
        if isinstance(rate, (int, float)) and rate > 0:
            return float(rate)
    return 0.0


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
    untested = layer_kinds(causal_lm.config) - family.layers
    if untested:
        return f"layers of the kind '{min(untested)}' are not tested for model type '{causal_lm.config.model_type}'"
    if not written.__module__.startswith("transformers.models."):
        return f"{name} is not transformers' own class, so its forward and loss are unknown"
    if hasattr(causal_lm, "_loss_function") or getattr(causal_lm, "loss_type", None) != "ForCausalLM":
        return f"{name} has a loss function of its own, which may not be a sum over tokens"
    return None


def _why_not_config(config: Any) -> str | None:
    if config._attn_implementation not in _IMPLEMENTATIONS:
        return f"attention implementation '{config._attn_implementation}' is kept; packing serves 'sdpa' and 'eager'"
    for name, value in sorted(config.to_dict().items()):
        is_random = ("drop" in name or "jitter" in name) and not name.startswith(("classifier", "summary"))
        if is_random and isinstance(value, float) and value > 0:
            return f"{name} is {value}; what it draws at random depends on the padding, packed attention has no dropout"
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


def why_not_inside(model: nn.Module, causal_lm: PreTrainedModel) -> str | None:
    """The reason if a module around ``causal_lm`` may compute a loss, or change the batch, in a way of its own."""
    for module in _holders(model, causal_lm)[:-1]:
        written = written_class(module)
        if written.__module__.split(".")[0] not in _KNOWN_WRAPPERS:
            return f"{written.__name__} around the model may have a loss of its own that is no sum over tokens"
    return None


def _holders(model: nn.Module, causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold ``causal_lm``, outermost first, and itself."""
    return [module for module in model.modules() if causal_lm in set(module.modules())]


def _why_not_patched(model: nn.Module, causal_lm: PreTrainedModel) -> str | None:
    """The reason if somebody else's function stands in the way of the loss.

    Pre-hooks may stay: what they change in a packed batch is noticed, batch by batch.
    """
    for module in _holders(model, causal_lm):
        name = type(module).__name__
        replaced = vars(module).get("forward")
        if replaced is not None and not all(map(_is_known, _layers(replaced))):
            return f"the forward of {name} was replaced, and what takes its place may have a loss that is no sum"
        for hook in module._forward_hooks.values():
            if not _is_known(hook):
                what = getattr(hook, "__qualname__", type(hook).__qualname__)
                return f"the forward hook {what} of {name} may change the loss"
    return None


def _layers(function: Any) -> list[Any]:
    """A function and those it was made to wrap, as `functools.wraps` and `functools.partial` record them."""
    layers = []
    while function is not None:
        layers.append(function)
        function = getattr(function, "__wrapped__", None) or getattr(function, "func", None)
    return layers


def _is_known(function: Any) -> bool:
    """Whether a function comes from a package that is known, or from this one."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)  # wraps() copies the module of what is wrapped; the globals stay
    module = getattr(function, "__globals__", {}).get("__name__") if code else type(function).__module__
    package = str(module).split(".")[0]
    return package in _KNOWN_PATCHES or package.startswith("fastft") or package == "functools"


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
