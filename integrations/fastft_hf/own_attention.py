"""The user's own FlashAttention or flex_attention: it stays, and gets what it needs of a packed row, made once a batch.

transformers hands both through a function of its own, which takes the boundaries as keyword arguments (FlashAttention
2, 3 and 4, and kernels of the hub like them) or as the attention mask (flex_attention). Softcap, sinks, windows and
scale are those that the model's layer passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward

from fastft_hf import foreign
from fastft_hf.stand_in import StockModule
from fastft_plugins.packing import METADATA_KEY, PackedMetadata
from fastft_plugins.packing.batch import flash_columns
from fastft_plugins.packing.block_mask import document_block_mask


def _flash_inputs(metadata: PackedMetadata, kwargs: dict[str, Any]) -> tuple[None, dict[str, Any]]:
    # With positions, some versions would look for the documents in every layer although they are given.
    return None, {**kwargs, "position_ids": None, **flash_columns(metadata)}


def _flex_inputs(metadata: PackedMetadata, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return document_block_mask(metadata, kwargs.get("sliding_window")), kwargs


@dataclass(frozen=True)
class _Own:
    inputs: Callable[[PackedMetadata, dict[str, Any]], tuple[Any, dict[str, Any]]]  # the mask, the keyword arguments
    gets: str


_OWN = {
    flash_attention_forward: _Own(_flash_inputs, "cu_seq_lens and max_length"),
    flex_attention_forward: _Own(_flex_inputs, "its block mask, from the lengths on the host,"),
}


def is_own(function: Any) -> bool:
    """Whether ``function`` is one of transformers' that can be given a packed row's boundaries."""
    return _find(function) is not None


def describe(function: Any, implementation: str) -> str | None:
    """For a report: what is kept and what it is given; None for another function."""
    own = _find(function)
    return None if own is None else f"the model's own {implementation}, which gets {own.gets} made once a batch"


def _find(function: Any) -> _Own | None:
    return next((_OWN[layer] for layer in foreign.layers(function) if layer in _OWN), None)


def attend(
    function: Callable[..., Any],
    module: StockModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metadata: PackedMetadata,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Call ``function``, which `is_own`, on a packed row.

    Args:
        module: the attention layer as stock sees it.
        query: ``[1, H, T, D]``; ``key`` and ``value`` are ``[1, G, T, D]``.
        kwargs: what the layer passed beside them.

    Returns:
        ``[1, T, H, D]``, and what stock returns beside it.
    """
    own = _find(function)
    assert own is not None
    mask, kwargs = own.inputs(metadata, {name: value for name, value in kwargs.items() if name != METADATA_KEY})
    result: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, **kwargs)
    return result
