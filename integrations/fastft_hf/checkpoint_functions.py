"""The function that a checkpointed layer of transformers calls: what is known of a stock one, and ours in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

FUNCTION = "_gradient_checkpointing_func"  # the attribute of a layer that it is in
REENTRANT = "use_reentrant=True: set gradient_checkpointing_kwargs={'use_reentrant': False}"


class CheckpointFunction:
    """``checkpoint_fn`` in the place of a stock function. A copy or pickle, as part of a model, is stock.

    Two that do the same are equal.
    """

    def __init__(self, checkpoint_fn: Callable[..., Any], stock: Any, stores_products: bool) -> None:
        self._checkpoint_fn, self._keywords = checkpoint_fn, _keywords(stock)
        # Asked for offloading, transformers copies on the stream that computes; the one that replaces it does not.
        self._ours = {"offload": _offloads(stock), "stores_products": stores_products}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_fn(*args, **self._keywords | kwargs, **self._ours)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointFunction) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return id(self._checkpoint_fn)

    def __reduce__(self) -> Any:
        return functools.partial(functools.partial, checkpoint, **self._keywords), ()


def is_flex(module: nn.Module) -> bool:
    """Whether its attention is flex_attention, which is compiled inside the layer."""
    config = getattr(module, "config", None)
    config = getattr(config, "_fastft_stock_config", config)
    return getattr(config, "_attn_implementation", None) == "flex_attention"


def is_checkpointed(module: nn.Module) -> bool:
    """Whether it is a layer, or a model, that calls such a function."""
    return bool(getattr(module, "gradient_checkpointing", False)) and FUNCTION in vars(module)


def why_not(stock: Any) -> str | None:
    """The reason if ours cannot take the place of the function."""
    inner = _inner(stock)
    if inner is not checkpoint and not _offloads(stock):
        return f"they call {getattr(inner, '__qualname__', type(inner).__name__)}, not torch's checkpoint"
    if _keywords(stock).get("use_reentrant") is not False:
        return REENTRANT
    return None


def _inner(stock: Any) -> Any:
    return stock.func if isinstance(stock, functools.partial) else stock


def _offloads(stock: Any) -> bool:
    """Whether it is what transformers makes for ``offload=True``: torch's checkpoint, what it saves put on the CPU."""
    name: str = getattr(_inner(stock), "__qualname__", "")
    return name.startswith("PreTrainedModel.") and name.endswith("checkpointing_enable.<locals>.checkpoint_func")


def _keywords(stock: Any) -> dict[str, Any]:
    return dict(stock.keywords) if isinstance(stock, functools.partial) else {}
