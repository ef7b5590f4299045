"""Keeps packed batches out of a model that a run does not pack: stock attention would mix their documents."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from fastft_plugins.errors import FastFTError
from fastft_plugins.hooks import RunHook
from fastft_plugins.packing.collator import METADATA_KEY
from fastft_plugins.packing.metadata import PackedMetadata

if TYPE_CHECKING:
    from fastft_plugins.run import Run


def refuse_packed_batches(run: Run) -> None:
    """Make the model, and every model inside it that is called by itself, raise `FastFTError` for a packed batch."""
    guard = _Guard(run)
    for module in run.model.modules():
        if module is run.model or "input_ids" in inspect.signature(type(module).forward).parameters:
            handle = module.register_forward_pre_hook(guard, with_kwargs=True)
            run.ledger.record("the guard against packed batches", handle.remove)


class _Guard(RunHook):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if isinstance(kwargs.get(METADATA_KEY), PackedMetadata):
            raise FastFTError(
                f"a packed batch reached {type(module).__name__}, but packing is off in this run: "
                f"{self.run.report.features['packing'].reason}. Stock attention would mix its documents. In place of "
                "PaddingFreeCollator(collator) use run.collator(collator), which packs only where the run does, in a "
                "loop of your own, and the collator itself in a Trainer"
            )
