"""The whole adapter: which trainer is ours, and where its collator is.

The model is one of transformers', so the attention inside it is the transformers adapter's work. Everything changed
here goes through ``run.ledger``, which puts it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastft_plugins import hookimpl
from fastft_plugins.run import Run, Target
from mini_trainer import MiniTrainer


@hookimpl
def fastft_matches(target: Any) -> Target | None:
    return Target(target.model, target, framework="mini_trainer") if isinstance(target, MiniTrainer) else None


@hookimpl
def fastft_inject_metadata(run: Run, wrap_collator: Callable[[Any], Any]) -> str | None:
    trainer = run.target.trainer
    if not isinstance(trainer, MiniTrainer):
        return None
    run.ledger.setattr(trainer, "collate", wrap_collator(trainer.collate))
    return "collator of the MiniTrainer"
