"""The modules of a model that see whole rows, known to be harmless; whether they still are, asked at every batch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastft_hf import foreign
from fastft_hf.suitability import holders_of


class Forwards:
    """The forwards of some modules; while all of them are the objects that they were, none is looked into again."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(map(weakref.ref, modules))
        self._seen = self._look()

    def changed(self) -> str | None:
        """The reason if the forward of one of the modules that still live is code of unknown origin by now."""
        now = self._look()
        if now == self._seen:
            return None
        reason = foreign.replaced_forward(self._alive())
        if reason is None:
            self._seen = now
        return reason

    def _look(self) -> list[Any]:
        found = [(type(module), vars(module).get("forward")) for module in self._alive()]
        return [*found, *((each.forward, each.__call__) for each in {each for each, _ in found})]

    def _alive(self) -> list[nn.Module]:
        return [module for reference in self._modules if (module := reference()) is not None]


class Holders:
    """The modules of a causal language model that hold attention: their forwards, and the parts they are made of."""

    def __init__(self, causal_lm: PreTrainedModel, attentions: Sequence[nn.Module]) -> None:
        self._causal_lm, self._attentions = causal_lm, list(attentions)
        self._find()

    def changed(self) -> str | None:
        """The reason if a part, or a forward, is of unknown origin by now, or a layer is not served."""
        if self._look() == self._seen:
            return self._forwards.changed()
        reason = self._why_not_parts()
        if reason is None:
            self._find()
        return reason

    def _find(self) -> None:
        holders = holders_of(self._causal_lm, self._attentions)
        self._forwards = Forwards(holders)
        self._parts = [holder._modules for holder in holders]
        self._seen = self._look()

    def _look(self) -> list[Any]:
        """The parts themselves, not their ids: the id of one that was replaced may be that of the next."""
        return [part for parts in self._parts for part in parts.values()]

    def _why_not_parts(self) -> str | None:
        parts = list(self._causal_lm.modules())
        reason = foreign.layer(parts)
        if reason is not None:
            return reason
        if not set(self._attentions) <= set(parts):
            return (
                f"attention layers of {type(self._causal_lm).__name__} were replaced, and the new ones are not packed"
            )
        return foreign.replaced_forward(holders_of(self._causal_lm, self._attentions))
