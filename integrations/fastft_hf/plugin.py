"""The hooks of the transformers adapter. No framework is imported before a hook is called with something of theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastft_plugins.errors import Declined
from fastft_plugins.hookspecs import hookimpl
from fastft_plugins.run import Feature, Run, Target


@hookimpl
def fastft_matches(target: Any) -> Target | None:
    if "transformers" not in sys.modules:  # then nothing can be a Trainer of theirs
        return None
    from transformers import Trainer

    return Target(target.model, target, framework="transformers") if isinstance(target, Trainer) else None


@hookimpl
def fastft_features() -> Sequence[Feature]:
    from fastft_hf.bookkeeping import BookkeepingFeature

    return [BookkeepingFeature()]


@hookimpl
def fastft_inject_metadata(run: Run, wrap_collator: Callable[..., Any]) -> str | None:
    if "transformers" not in sys.modules:
        return None
    from transformers import Trainer

    from fastft_hf import metrics, model, trainer
    from fastft_hf.suitability import around_of, family_of, why_not_inside

    _check_that_the_model_stays(run)
    if run.target.framework == "transformers" and run.target.trainer is None:
        raise Declined("the Trainer that calls this callback cannot be found, so its loss is unknown")
    has_trainer, is_loop = isinstance(run.target.trainer, Trainer), run.target.trainer is None
    causal_lm = model.find_causal_lm(run.model)
    if causal_lm is None:
        if has_trainer or (is_loop and model.holds_pretrained(run.model)):
            raise model.not_a_causal_lm(run.model)
        return None
    around = around_of(run.model, causal_lm) if has_trainer else []
    reason = why_not_inside(around)
    if reason is not None:
        raise Declined(reason)
    # The adapter of another trainer may have reasons of its own for a batch without metadata.
    checks = [partial(trainer.why_not_loss, run.target.trainer)] if has_trainer else []
    if around:
        checks.append(partial(why_not_inside, around))
    changes = [model.inject_packed_attention(run, causal_lm, counts_bare=has_trainer or is_loop, checks=checks)]
    moves_positions = family_of(causal_lm).moves_positions
    if run.wrap_collator is not None:
        run.wrap_collator = partial(run.wrap_collator, move_positions=moves_positions)
    if has_trainer:
        metrics.add_to_log(run)
        changes.append(trainer.inject_collator(run, partial(wrap_collator, move_positions=moves_positions)))
    return "; ".join(changes)


@hookimpl
def fastft_inject_router(run: Run, experts_fn: Callable[..., Any]) -> str | None:
    if "transformers" not in sys.modules:
        return None
    from fastft_hf import experts, metrics

    _check_that_the_model_stays(run)
    metrics.add_to_log(run)
    return experts.inject_experts(run, experts_fn)


@hookimpl
def fastft_inject_reloader(run: Run, checkpoint_fn: Callable[..., Any]) -> str | None:
    if "transformers" not in sys.modules:
        return None
    from fastft_hf import checkpointing, metrics

    _check_that_the_model_stays(run)
    metrics.add_to_log(run)
    return checkpointing.inject_reloader(run, checkpoint_fn)


def _check_that_the_model_stays(run: Run) -> None:
    """Raise `Declined` for a block around a Trainer that replaces its model when it trains."""
    from fastft_hf.targets import makes_model_anew

    if makes_model_anew(run):
        raise Declined(
            "the Trainer makes its model anew in train() (model_init): use FastFTCallback, which starts then"
        )
