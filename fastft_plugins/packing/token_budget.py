"""What a report says where ``max_tokens_per_batch`` is set: that it holds, or why it has no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastft_plugins.errors import Declined
from fastft_plugins.packing.metadata import PackedMetadata

if TYPE_CHECKING:
    from fastft_plugins.run import Run


def decline_token_budget(run: Run, reason: str) -> None:
    """Note once why the batches of ``run`` keep their number of rows, and warn of it.

    Raises:
        FastFTError: under ``packing="on"`` or ``strict=True``.
    """
    run.token_budget = None
    setting = f"max_tokens_per_batch={run.config.max_tokens_per_batch} has no effect"
    changes = run.report.features["packing"].changes
    if any(change.startswith(setting) for change in changes):
        return
    changes.append(f"{setting}: {reason}")
    run.fall_short("packing", Declined(f"{setting}: {reason}"), "leaves batches their number of documents")


def measure_token_budget(run: Run, metadata: PackedMetadata) -> None:
    """Add to the report how full batches are, and how many documents were too long for one, with host numbers only."""
    metrics, budget = run.report.features["packing"].metrics, run.token_budget
    if budget is not None:
        metrics["budget_share"] = metrics["tokens"] / (budget * metrics["packed_batches"])
        longer = sum(length > budget for length in metadata.lengths)
        metrics["longer_documents"] = metrics.get("longer_documents", 0) + longer
