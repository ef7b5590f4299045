"""The packing feature: hands its collator to the adapters and says at the end what came of it."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from fastft_plugins.kernels.dispatch import choices, forget
from fastft_plugins.packing.collator import PaddingFreeCollator
from fastft_plugins.packing.counting import BatchCount, count_of
from fastft_plugins.packing.guard import refuse_packed_batches
from fastft_plugins.packing.token_budget import decline_token_budget

if TYPE_CHECKING:
    from fastft_plugins.report import FeatureReport
    from fastft_plugins.run import Run

logger = logging.getLogger("fastft")


class PackingFeature:
    """Rows without padding, metadata computed once a batch, attention without a T×T mask."""

    name = "packing"

    def start(self, run: Run) -> str:
        """See `fastft_plugins.run.Feature`."""
        forget()
        run.wrap_collator = partial(PaddingFreeCollator, flash_arguments=False)
        changes = run.call("fastft_inject_metadata", wrap_collator=PaddingFreeCollator)
        run.report.features[self.name].changes.extend(changes)
        if run.config.max_tokens_per_batch is not None and run.token_budget is None:
            decline_token_budget(run, "only transformers' Trainer, TRL's included, lets fastft form its batches")
        return "batches are packed without padding, loss and gradients stay those of the padded run"

    def stay_off(self, run: Run) -> None:
        """See `fastft_plugins.run.Feature`."""
        refuse_packed_batches(run)
        if run.config.max_tokens_per_batch is not None:
            decline_token_budget(run, "packing is off in this run")

    def stop(self, run: Run) -> None:
        """See `fastft_plugins.run.Feature`."""
        entry, count = run.report.features[self.name], count_of(run)
        entry.changes.extend(count.notes())
        if count.packed:
            entry.changes.extend(f"attention kernel: {choice}" for choice in choices("attention"))
        elif entry.enabled:
            _nothing_was_packed(run, entry, count)
        dropped = int(entry.metrics.get("dropped_labels", 0))
        if dropped and entry.enabled:
            entry.reason = (
                "batches are packed without padding; loss and gradients are those of the padded run without "
                f"{dropped:,} first labels of left-padded rows, which stock trains from padding, dropped here"
            )


def _nothing_was_packed(run: Run, entry: FeatureReport, count: BatchCount) -> None:
    """Packing was possible, and yet it did nothing: a report that says "on" would mislead."""
    reasons = count.reasons.most_common(1)
    why = reasons[0][0] if reasons else "none with packed metadata reached the model in training"
    entry.enabled, entry.reason = False, f"no batch was packed: {why}"
    if count.may_have_trained and not count.has_complained:
        logger.warning("fastft: packing was on, but %s", entry.reason)
