"""Packed attention inside a stock transformers model.

Two seams, both on instances. A forward pre-hook on the decoder gives a packed batch a 4-D mask of size zero: masking
then returns it as it is, before it would look for packed sequences (which waits for the GPU) or build a T×T mask. And
every attention module gets a config that names the attention function registered here; it serves packed
batches, found by the metadata among the keyword arguments, and hands all others to the model's own function. A user's
FlashAttention or flex_attention serves the packed ones too.
The metadata travels with the call, so a checkpointed layer finds it again when it is recomputed. Layers that do not
pass keyword arguments on still pass the mask on, so the mask carries the metadata too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastft_hf import own_attention, stock_attention
from fastft_hf.decoder_hook import DecoderHook
from fastft_hf.parts import Holders
from fastft_hf.settings import Settings, why_not_settings
from fastft_hf.stand_in import StandInConfig, StockModule, stock_config
from fastft_hf.suitability import (
    family_of,
    why_not,
    why_not_attention,
    why_not_code,
)
from fastft_plugins.errors import Declined, FastFTError
from fastft_plugins.packing import METADATA_KEY, packed_attention
from fastft_plugins.run import Run

# Floating-point arguments of attention that packed attention honours.
_KNOWN = ("s_aux",)
_ATTENTION_NAME = "fastft"  # without "flash": transformers treats such names as FlashAttention


def find_causal_lm(model: nn.Module) -> PreTrainedModel | None:
    """The one causal language model of transformers in ``model``: itself, or below PEFT's or the user's wrapper."""
    found = [module for module in model.modules() if _is_causal_lm(module)]
    return found[0] if len(found) == 1 else None


def _is_causal_lm(module: nn.Module) -> bool:
    names = (base.__name__ for base in type(module).__mro__)  # a user's subclass may have any name
    return isinstance(module, PreTrainedModel) and any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def holds_pretrained(model: nn.Module) -> bool:
    """Whether any part of ``model`` is a model of transformers."""
    return any(isinstance(module, PreTrainedModel) for module in model.modules())


def not_a_causal_lm(model: nn.Module) -> Declined:
    """Why `find_causal_lm` has found none in ``model``, or more than one."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    number = sum(map(_is_causal_lm, models))
    if number > 1:
        return Declined(f"{type(model).__name__} holds {number} causal language models; packing serves one")
    if not models:
        return Declined(f"{type(model).__name__} does not hold a causal language model of transformers")
    return Declined(
        f"{type(models[0]).__name__}, model type '{models[0].config.model_type}', is no causal language model of a "
        "family that is packed; docs/families.md lists those"
    )


def inject_packed_attention(
    run: Run, causal_lm: PreTrainedModel, *, counts_bare: bool, checks: Sequence[Callable[[], str | None]] = ()
) -> str:
    """Install both seams through the run's ledger.

    Args:
        checks: asked at every packed batch, beside the model's own: the reason why packing is no longer exact, or None.
        counts_bare: whether each training batch should come with metadata, so that one without counts as unpacked.

    Raises:
        Declined: where packing could differ from stock.
    """
    attentions = [module for module in causal_lm.modules() if _is_attention(module)]
    reason = why_not(run.model, causal_lm) or why_not_attention(causal_lm, attentions)
    if reason is not None:
        raise Declined(reason)
    decoder = _innermost_model(causal_lm, attentions)
    reason = why_not_settings(causal_lm, decoder, attentions)
    if reason is not None:
        raise Declined(reason)
    run.ledger.share("transformers' attention function 'fastft'", _register, _unregister)
    for attention in attentions:
        run.ledger.setattr(attention, "config", StandInConfig(attention.config, _attn_implementation=_ATTENTION_NAME))
    settings = Settings(causal_lm, decoder, attentions)
    checks = (partial(why_not_code, causal_lm), Holders(causal_lm, attentions).changed, settings.changed, *checks)
    hook = DecoderHook(run, family_of(causal_lm), counts_bare, checks)
    run.ledger.record(
        "the decoder's forward pre-hook", decoder.register_forward_pre_hook(hook, with_kwargs=True).remove
    )
    where = f"packed attention in {len(attentions)} layers of {type(causal_lm).__name__}"
    implementation = stock_config(attentions[0])._attn_implementation
    own = own_attention.describe(stock_attention.stock_function(attentions[0]), implementation)
    return where if own is None else f"{where}, through {own}"


def _innermost_model(causal_lm: PreTrainedModel, attentions: list[nn.Module]) -> nn.Module:
    """The decoder: the smallest model of transformers that holds all attention layers. Causal LMs call it directly."""
    models = [module for module in causal_lm.modules() if isinstance(module, PreTrainedModel)]
    holding: list[nn.Module] = [model for model in models if set(attentions) <= set(model.modules())]
    return holding[-1]


def _is_attention(module: nn.Module) -> bool:
    """Whether the module looks its attention function up in transformers' registry, by the name in its config."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention signature: q ``[B, H, T, D]``, k and v ``[B, G, T, D]`` → ``[B, T, H, D]``."""
    metadata = kwargs.get(METADATA_KEY) or getattr(attention_mask, METADATA_KEY, None)
    if metadata is None:
        stock = stock_attention.stock_function(module)
        result: tuple[Tensor, Tensor | None] = stock(StockModule(module), query, key, value, attention_mask, **kwargs)
        return result
    _check_arguments(module, attention_mask, kwargs)
    stock, is_own, ignores, _ = stock_attention.of_batch(module, metadata)
    if is_own:
        return own_attention.attend(stock, StockModule(module), query, key, value, metadata, kwargs)
    if ignores and kwargs.get("softcap") is not None and stock_attention.sdpa_refuses_softcap():
        raise FastFTError(f"{type(module).__name__} passes a softcap, which stock's 'sdpa' refuses; choose 'eager'")
    out_THD = packed_attention(
        # Not query[0]: the backward of a selection copies the gradient into a tensor of zeros, in every layer.
        query.transpose(1, 2).squeeze(0),
        key.transpose(1, 2).squeeze(0),
        value.transpose(1, 2).squeeze(0),
        metadata,
        window=kwargs.get("sliding_window"),
        softcap=None if ignores else kwargs.get("softcap"),
        sinks=None if ignores else kwargs.get("s_aux"),
        scale=kwargs.get("scaling"),
    )
    return out_THD.unsqueeze(0), None


def _check_arguments(module: nn.Module, attention_mask: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what would change stock's result and packed attention does not know: dropout, biases, masks."""
    if isinstance(attention_mask, Tensor) and attention_mask.numel():  # the one that the decoder was given is empty
        raise FastFTError(
            f"{type(module).__name__} got a mask that did not come from its batch, which packed attention cannot "
            "honour; train with packing='off'"
        )
    unknown = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and name not in _KNOWN and value.is_floating_point() and value.dim()
    ]
    if kwargs.get("dropout") or kwargs.get("is_causal") is False:
        unknown.append("dropout" if kwargs.get("dropout") else "is_causal=False")
    if unknown:
        raise FastFTError(
            f"{type(module).__name__} calls attention with '{unknown[0]}', which packed attention cannot honour; "
            "train with packing='off'"
        )


def _register() -> None:
    AttentionInterface.register(_ATTENTION_NAME, _attention_forward)


def _unregister() -> None:
    AttentionInterface._global_mapping.pop(_ATTENTION_NAME, None)
