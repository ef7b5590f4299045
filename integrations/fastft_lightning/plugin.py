"""The hooks of the Lightning adapter. No framework is imported before a hook is called with something of theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastft_plugins.errors import Declined
from fastft_plugins.hookspecs import hookimpl
from fastft_plugins.run import Run, Target

_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
_FABRICS = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")


@hookimpl
def fastft_matches(target: Any) -> Target | None:
    for name in _NAMESPACES:
        if name in sys.modules and isinstance(target, sys.modules[name].Trainer):
            # A Trainer learns its model when it fits; until then the run has nothing to look at.
            return Target(nn.Module(), target, "lightning", hand_over=_add_callback)
    for name in _FABRICS:
        if name in sys.modules and isinstance(target, sys.modules[name]._FabricModule):
            return Target(target, None, "fabric")
    return None


@hookimpl
def fastft_inject_metadata(run: Run, wrap_collator: Callable[..., Any]) -> str | None:
    framework = run.target.framework
    if framework not in ("lightning", "fabric"):
        return None
    if "transformers" not in sys.modules:
        raise Declined(f"{type(run.model).__name__} does not hold a causal language model of transformers")
    from fastft_hf import model
    from fastft_hf.suitability import family_of
    from fastft_lightning import fabric, trainer

    causal_lm = model.find_causal_lm(run.model)
    if causal_lm is None:
        raise model.not_a_causal_lm(run.model)
    if framework == "fabric":
        return fabric.inject_seal(run, causal_lm)
    wrap = partial(wrap_collator, move_positions=family_of(causal_lm).moves_positions)
    return trainer.inject_batches(run, causal_lm, wrap)


def _add_callback(run: Run) -> None:
    from fastft_lightning.callback import FastFTLightningCallback

    trainer, callback = run.target.trainer, FastFTLightningCallback.for_block(run)
    trainer.callbacks = [*trainer.callbacks, callback]

    def remove() -> None:
        callback.close()
        trainer.callbacks = [other for other in trainer.callbacks if other is not callback]

    run.ledger.record("the Trainer's callback", remove)
