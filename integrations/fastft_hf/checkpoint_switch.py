"""Notices when checkpointing of a transformers model is switched on or off, which gives the layers stock functions.

TRL does so around each forward of a reference and each generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastft_hf.model_method import ModelMethod
from fastft_plugins.ledger import Ledger

# What all that switches on or off comes to, under old names ("gradient") and new ones ("activation").
_SWITCH = "_set_gradient_checkpointing"


def follow_switch(model: nn.Module, ledger: Ledger, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call ``before`` and ``after`` around each change of the checkpointing of ``model`` or a model inside it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            ledger.setattr(module, _SWITCH, _Switch(module, before, after))


class _Switch(ModelMethod):
    def __init__(self, model: PreTrainedModel, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__(model, _SWITCH)
        self.__wrapped__ = getattr(model, _SWITCH)  # transformers looks at its signature
        self._before, self._after = before, after

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._before()
        self.__wrapped__(*args, **kwargs)
        self._after()
