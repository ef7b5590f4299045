"""The attention function that a layer has without a run, looked up once a batch."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastft_hf import own_attention
from fastft_hf.stand_in import stock_config
from fastft_hf.suitability import attention_function
from fastft_plugins.packing import PackedMetadata


class Stock(NamedTuple):
    """The attention function that layers of a class with the same config have without a run."""

    function: Callable[..., Any]
    is_own: bool  # one that gets the row's boundaries; otherwise packed attention takes its place
    ignores: bool  # softcap and sinks: sdpa knows neither, and where a transformers version passes it one, ignores it
    config: Any  # held, so that no other config gets its id


# By batch, class of layer and config: to look it up takes as long as the rest of a layer's call.
_of_batch: weakref.WeakKeyDictionary[PackedMetadata, dict[tuple[type, int], Stock]] = weakref.WeakKeyDictionary()


def of_batch(module: nn.Module, metadata: PackedMetadata) -> Stock:
    config, known = stock_config(module), _of_batch.get(metadata)
    if known is None:
        known = _of_batch.setdefault(metadata, {})
    key = (type(module), id(config))
    stock = known.get(key)
    if stock is None:
        function, ignores = stock_function(module), config._attn_implementation == "sdpa"
        stock = known[key] = Stock(function, own_attention.is_own(function), ignores, config)
    return stock


def forget(metadata: PackedMetadata) -> None:
    """At the begin of each forward: the function may have changed since a batch that comes again came last."""
    _of_batch.pop(metadata, None)


def stock_function(module: nn.Module) -> Callable[..., Any]:
    function: Callable[..., Any] = attention_function(module, stock_config(module)._attn_implementation)
    return function


@functools.cache
def sdpa_refuses_softcap() -> bool:
    """Whether the installed version does: from 5.24 on. Those before go on without it."""
    tensor, module = torch.zeros(1, 1, 1, 8, device="cpu"), types.SimpleNamespace(is_causal=True)
    try:
        sdpa_attention_forward(module, tensor, tensor, tensor, None, softcap=1.0)
    except ValueError:
        return True
    return False
