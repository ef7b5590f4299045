"""The stacks that can be compared. To add one, write a function here that returns what `measure_*` returns.

Those of TRL's SFTTrainer are combinations of a few parts and have their names from these: see `benchmarks.sft_names`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import DataCollatorWithFlattening

from benchmarks.measure import measure_model, measure_trainer
from benchmarks.settings import Settings
from benchmarks.sft_names import SftStack
from benchmarks.shapes import build_model, enable_checkpointing
from benchmarks.tokenizer import padding_collator
from fastft_plugins.config import FEATURES

Stack = Callable[[Settings], dict[str, Any]]
STACKS: dict[str, Stack] = {}
# The Trainer's stacks compare packing and experts at equal checkpointing; plans of it have stacks of TRL's.
_EQUAL = {"checkpointing": "off"}
OFF = dict.fromkeys(FEATURES, "off")


def stack(name: str) -> Callable[[Stack], Stack]:
    """Register the function below under `name`; its docstring's first line is what --help shows."""

    def register(function: Stack) -> Stack:
        STACKS[name] = function
        return function

    return register


def find_stack(name: str) -> Stack:
    """Return the stack of that name.

    Raises:
        ValueError: there is none.
    """
    if name in STACKS:
        return STACKS[name]
    sft_stack = SftStack.from_name(name)

    def measure(settings: Settings) -> dict[str, Any]:
        from benchmarks.sft import measure_sft

        return measure_sft(settings, sft_stack)

    return measure


@stack("stock-padded")
def _stock_padded(settings: Settings) -> dict[str, Any]:
    """Trainer, padding collator, sdpa"""
    return measure_trainer(settings, padding_collator())


@stack("fastft-padded")
def _fastft_padded(settings: Settings) -> dict[str, Any]:
    """the same Trainer with FastFTCallback({"checkpointing": "off"})"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, padding_collator(), [FastFTCallback(_EQUAL)])


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
    """the packed Trainer with FastFTCallback({"checkpointing": "off"}) and use_liger_kernel=True"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, DataCollatorWithFlattening(), [FastFTCallback(_EQUAL)], liger=True)


@stack("fastft-packed")
def _fastft_packed(settings: Settings) -> dict[str, Any]:
    """the same packed Trainer with FastFTCallback({"checkpointing": "off"})"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, DataCollatorWithFlattening(), [FastFTCallback(_EQUAL)])


@stack("fastft-off")
def _fastft_off(settings: Settings) -> dict[str, Any]:
    """stock-packed with FastFTCallback and every feature "off": what it costs to have us there"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, DataCollatorWithFlattening(), [FastFTCallback(OFF)])


@stack("packed-stock-experts")
def _packed_stock_experts(settings: Settings) -> dict[str, Any]:
    """fastft-packed with {"moe": "off"} as well: what the experts of fastft-packed are held to"""
    from fastft_plugins import FastFTCallback

    return measure_trainer(settings, DataCollatorWithFlattening(), [FastFTCallback({"moe": "off"} | _EQUAL)])


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
        result = measure_model(settings, model, PaddingFreeCollator(padding_collator()))
    return {**result, "report": run.report.to_dict()}


@stack("lightning-padded")
def _lightning_padded(settings: Settings) -> dict[str, Any]:
    """lightning.Trainer, padding collator, sdpa"""
    from benchmarks.lightning_fit import measure_lightning

    return measure_lightning(settings, padding_collator())


@stack("lightning-fastft-padded")
def _lightning_fastft_padded(settings: Settings) -> dict[str, Any]:
    """the same lightning.Trainer with plugins=[FastFTPlugin({"checkpointing": "off"})]"""
    from benchmarks.lightning_fit import measure_lightning
    from fastft_plugins import FastFTPlugin

    return measure_lightning(settings, padding_collator(), FastFTPlugin(_EQUAL))


@stack("lightning-fastft-off")
def _lightning_fastft_off(settings: Settings) -> dict[str, Any]:
    """the same lightning.Trainer with FastFTPlugin and every feature "off": what it costs to have us there"""
    from benchmarks.lightning_fit import measure_lightning
    from fastft_plugins import FastFTPlugin

    return measure_lightning(settings, padding_collator(), FastFTPlugin(OFF))


@functools.cache  # in one process, the stacks take turns on one model
def _bare_model(settings: Settings) -> Any:
    model = build_model(settings)
    if settings.checkpointing:
        enable_checkpointing(model)
    return model
