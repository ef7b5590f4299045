"""The packing feature: hands its collator to the adapters and counts what it saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastft_plugins.kernels.dispatch import choices, forget
from fastft_plugins.packing.collator import PaddingFreeCollator
from fastft_plugins.packing.metadata import NotPacked, PackedMetadata

if TYPE_CHECKING:
    from fastft_plugins.report import FeatureReport
    from fastft_plugins.run import Run


class PackingFeature:
    """Rows without padding, metadata computed once a batch, attention without a T×T mask."""

    name = "packing"

    def start(self, run: Run) -> str:
        """See `fastft_plugins.run.Feature`."""
        forget()
        changes = run.call("fastft_inject_metadata", wrap_collator=PaddingFreeCollator)
        run.report.features[self.name].changes.extend(changes)
        return "batches are packed without padding, loss and gradients stay those of the padded run"

    def stop(self, run: Run) -> None:
        """See `fastft_plugins.run.Feature`."""
        entry = run.report.features[self.name]
        if entry.metrics.get("packed_batches"):
            entry.changes.extend(f"attention kernel: {choice}" for choice in choices("attention"))
        dropped = int(entry.metrics.get("dropped_labels", 0))
        if dropped:
            entry.changes.append(
                f"{dropped:,} first labels of left-padded rows, which stock trains from padding, dropped"
            )


def count_batch(entry: FeatureReport, metadata: PackedMetadata | NotPacked) -> None:
    """Add one training batch to the report; called once per forward, with host numbers only."""
    metrics = entry.metrics
    if isinstance(metadata, NotPacked):
        metrics["unpacked_batches"] = metrics.get("unpacked_batches", 0) + 1
        note = f"some batches stayed as the collator made them: {metadata.reason}"
        if note not in entry.changes:
            entry.changes.append(note)
        return
    added = {
        "packed_batches": 1,
        "documents": len(metadata.lengths),
        "tokens": metadata.total_tokens,
        "padding_removed": metadata.padded_tokens - metadata.total_tokens,
        "dropped_labels": metadata.dropped_labels,
    }
    for name, value in added.items():
        metrics[name] = metrics.get(name, 0) + value
    padded = metrics["tokens"] + metrics["padding_removed"]
    metrics["padding_share"] = metrics["padding_removed"] / padded
