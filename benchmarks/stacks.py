"""The stacks that can be compared. To add one, write a function here that returns what `measure_*` returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast

from benchmarks.measure import Batch, measure_model, measure_trainer
from benchmarks.settings import Settings
from benchmarks.shapes import build_model, enable_checkpointing

Stack = Callable[[Settings], dict[str, Any]]
STACKS: dict[str, Stack] = {}


def stack(name: str) -> Callable[[Stack], Stack]:
    """Register the function below under `name`; its docstring's first line is what --help shows."""

    def register(function: Stack) -> Stack:
        STACKS[name] = function
        return function

    return register


@stack("stock-padded")
def _stock_padded(settings: Settings) -> dict[str, Any]:
    """Trainer, padding collator, sdpa"""
    return measure_trainer(settings, _padding_collator())


@stack("fastft-padded")
def _fastft_padded(settings: Settings) -> dict[str, Any]:
    """the same Trainer with callbacks=[FastFTCallback()]"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, _padding_collator(), [FastFTCallback()])


@stack("stock-packed")
def _stock_packed(settings: Settings) -> dict[str, Any]:
    """Trainer, DataCollatorWithFlattening (position_ids only), sdpa"""
    return measure_trainer(settings, DataCollatorWithFlattening())


@stack("stock-packed-flex")
def _stock_packed_flex(settings: Settings) -> dict[str, Any]:
    """the packed Trainer with flex_attention, compiled by transformers"""
    return measure_trainer(settings, DataCollatorWithFlattening(), attention="flex_attention")


@stack("stock-packed-flex-liger")
def _stock_packed_flex_liger(settings: Settings) -> dict[str, Any]:
    """the packed Trainer with flex_attention and use_liger_kernel=True"""
    return measure_trainer(settings, DataCollatorWithFlattening(), attention="flex_attention", liger=True)


@stack("fastft-packed-liger")
def _fastft_packed_liger(settings: Settings) -> dict[str, Any]:
    """the packed Trainer with callbacks=[FastFTCallback()] and use_liger_kernel=True"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, DataCollatorWithFlattening(), [FastFTCallback()], liger=True)


@stack("fastft-packed")
def _fastft_packed(settings: Settings) -> dict[str, Any]:
    """the same packed Trainer with callbacks=[FastFTCallback()]"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, DataCollatorWithFlattening(), [FastFTCallback()])


@stack("packed-stock-experts")
def _packed_stock_experts(settings: Settings) -> dict[str, Any]:
    """the packed Trainer with FastFTCallback({"moe": "off"}): what the experts of fastft-packed are held to"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, DataCollatorWithFlattening(), [FastFTCallback({"moe": "off"})])


@stack("varlen-rebuilt")
def _varlen_rebuilt(settings: Settings) -> dict[str, Any]:
    """forward + backward: our attention, its metadata rebuilt from position_ids in every layer"""
    from benchmarks.rebuilt_attention import rebuilt_attention

    model = _bare_model(settings)
    with rebuilt_attention(model):
        return measure_model(settings, model, DataCollatorWithFlattening())


@stack("fastft-model")
def _fastft_model(settings: Settings) -> dict[str, Any]:
    """forward + backward: `with apply(model)`, metadata made once per batch"""
    from fastft_plugins import apply
    from fastft_plugins.packing import PaddingFreeCollator

    model = _bare_model(settings)
    # The other features stay off: against varlen-rebuilt, only the cost of the metadata may differ.
    with apply(model, {"packing": "on", "checkpointing": "off", "moe": "off"}) as run:
        result = measure_model(settings, model, PaddingFreeCollator(_padding_collator()))
    return {**result, "report": run.report.to_dict()}


@functools.cache  # in one process, the stacks take turns on one model
def _bare_model(settings: Settings) -> Any:
    model = build_model(settings)
    if settings.checkpointing:
        enable_checkpointing(model)
    return model


def _padding_collator() -> Callable[..., Batch]:
    """transformers' own right-padding collator, which asks for a tokenizer but only uses its padding token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )
    collator: Callable[..., Batch] = DataCollatorForSeq2Seq(tokenizer)
    return collator
