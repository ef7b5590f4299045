"""The settings that make packed attention stock's: of the config, of the attention layers, of transformers' registry.

Each is asked before a run, and again at each batch: somebody may change it while the run lasts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastft_hf import foreign
from fastft_hf.stand_in import StandInConfig, stock_config
from fastft_hf.stock_attention import sdpa_refuses_softcap
from fastft_hf.suitability import attention_functions, why_not_config, why_not_kinds
from fastft_hf.windows import why_not_windows

# What attention layers keep of the settings, as their own.
_OF_LAYERS = ("config", "sliding_window", "is_sliding", "is_causal")


def why_not_settings(causal_lm: PreTrainedModel, decoder: nn.Module, attentions: Sequence[nn.Module]) -> str | None:
    """The reason why these layers of ``decoder``, inside ``causal_lm``, cannot be served as they are set, or None."""
    reasons = (why_not_config(config) for config in _configs(causal_lm, decoder, attentions))
    reason = next(filter(None, reasons), None) or why_not_kinds(causal_lm)
    if reason is not None:
        return reason
    for attention in attentions:
        name = type(attention).__name__
        if not getattr(attention, "is_causal", True):
            return f"attention layers of {type(causal_lm).__name__} are not causal; packed attention is"
        homes = (foreign.foreign_home(each) for each in attention_functions(attention))
        home = next(filter(None, homes), None)
        if home is not None:
            return f"{name} attends by code of {home}; packed attention would take its place"
        is_sdpa = stock_config(attention)._attn_implementation == "sdpa"
        if is_sdpa and _passes_softcap(attention) and sdpa_refuses_softcap():
            return f"{name} has a softcap, which stock's 'sdpa' refuses; choose 'eager' or 'flex_attention'"
    return why_not_windows(decoder.config, attentions)


class Settings:
    """The settings with which a run began; `changed` is quick enough to be asked at every batch.

    While all of them are the objects that they were, none is looked into again.
    """

    def __init__(self, causal_lm: PreTrainedModel, decoder: nn.Module, attentions: Sequence[nn.Module]) -> None:
        self._of = causal_lm, decoder, attentions
        self._remember()

    def changed(self) -> str | None:
        """The reason if packed attention is no longer stock's."""
        if self._look() == self._seen:
            return None
        for attention in self._of[2]:
            if not isinstance(attention.config, StandInConfig):
                return f"{type(attention).__name__} got another config, which does not name packed attention"
        reason = why_not_settings(*self._of)
        if reason is None:
            self._remember()
        return reason

    def _remember(self) -> None:
        attentions = self._of[2]
        self._held = _configs(*self._of)
        self._configs = [vars(config) for config in self._held]
        self._layers = [vars(attention) for attention in attentions]
        kinds = {(type(attention), id(stock_config(attention))): attention for attention in attentions}
        self._kinds = list(kinds.values())
        self._seen = self._look()

    def _look(self) -> list[Any]:
        causal_lm, decoder, _ = self._of
        return [
            id(causal_lm.config),  # the configs themselves are held, so that no other gets their ids
            id(decoder.config),
            *(config.copy() for config in self._configs),
            *(tuple(config.get("layer_types") or ()) for config in self._configs),  # a list, changed in its place
            *(layer.get(name) for layer in self._layers for name in _OF_LAYERS),
            *map(attention_functions, self._kinds),
        ]


def _passes_softcap(attention: nn.Module) -> bool:
    """Whether the layer hands its softcap to attention. Gemma3's has one too, of which its forward knows nothing."""
    constants = inspect.unwrap(type(attention).forward).__code__.co_consts
    names = {name for constant in constants if isinstance(constant, tuple) for name in constant}
    return "softcap" in names and getattr(attention, "attn_logit_softcapping", None) is not None


def _configs(causal_lm: PreTrainedModel, decoder: Any, attentions: Sequence[nn.Module]) -> list[Any]:
    """Each config once, the model's first."""
    configs = (causal_lm.config, decoder.config, *map(stock_config, attentions))
    return list({id(config): config for config in configs}.values())
