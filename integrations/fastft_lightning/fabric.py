"""Fabric: the metadata of a packed row on its way through Fabric's wrapper around the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastft_plugins.hooks import RunHook
from fastft_plugins.packing import METADATA_KEY
from fastft_plugins.run import Run


class Sealed:
    """Fabric's precision plugins take dataclasses in a model's arguments apart, and fail on frozen ones; not this."""

    def __init__(self, content: Any) -> None:
        self.content = content


def inject_seal(run: Run, causal_lm: nn.Module) -> str | None:
    """Seal the metadata before Fabric's wrapper sees it, and open it where the model begins."""
    if run.model is causal_lm:
        return None
    for module, hook in ((run.model, _Seal(run)), (causal_lm, _Open(run))):
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        run.ledger.record("a forward pre-hook for Fabric", handle.remove)
    return "metadata carried through Fabric's wrapper"


class _Seal(RunHook):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if METADATA_KEY not in kwargs:
            return None
        return args, kwargs | {METADATA_KEY: Sealed(kwargs[METADATA_KEY])}


class _Open(RunHook):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        sealed = kwargs.get(METADATA_KEY)
        return (args, kwargs | {METADATA_KEY: sealed.content}) if isinstance(sealed, Sealed) else None
