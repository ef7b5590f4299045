"""The windows of attention layers. Stock's masks take a layer's from the config of that moment; packed attention takes
the one that the layer passes, which it may have kept from the moment at which it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastft_hf.stand_in import stock_config


def why_not_windows(config: Any, attentions: Sequence[nn.Module]) -> str | None:
    """The reason if one of ``attentions``, in their order, passes another window than masks made from ``config``."""
    for index, attention in enumerate(attentions):
        passed, masked = _passed(attention), _masked(config, attention, index)
        if passed != masked:
            return (
                f"layer {index}'s {type(attention).__name__} has a window of {passed}, made when it was, and the "
                f"model's config, from which stock makes masks, says {masked} now"
            )
    return None


def _passed(attention: nn.Module) -> Any:
    own = vars(attention)
    if "sliding_window" not in own:  # the layer looks into its config at each call, or has no windows
        return getattr(stock_config(attention), "sliding_window", None)
    return own["sliding_window"] if own.get("is_sliding", True) else None


def _masked(config: Any, attention: nn.Module, index: int) -> Any:
    kinds = getattr(config, "layer_types", None)
    if "sliding_window" in vars(attention) and kinds:
        is_sliding = index < len(kinds) and kinds[index] == "sliding_attention"
        return config.sliding_window if is_sliding else None
    return getattr(config, "sliding_window", None)
