"""Counts a run's training batches, packed or not, and says so when one was not."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastft_plugins.errors import Declined
from fastft_plugins.packing.metadata import PackedMetadata
from fastft_plugins.packing.token_budget import measure_token_budget

if TYPE_CHECKING:
    from fastft_plugins.run import Run


class BatchCount:
    """One run's training batches. A loss may run the model several times on a batch; that is one batch still."""

    def __init__(self) -> None:
        self.packed = 0
        self.reasons: Counter[str] = Counter()  # of the others
        self.has_complained = False
        self.may_have_trained = False  # on a batch that is not counted, in evaluation mode but with gradients
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def is_new(self, batch: object) -> bool:
        """Whether ``batch``, an object that stands for it and lives as long, is counted for the first time."""
        if batch in self._seen:
            return False
        self._seen.add(batch)
        return True

    def notes(self) -> Iterator[str]:
        """How many batches were not packed, and why."""
        for reason, number in self.reasons.items():
            total = self.packed + self.reasons.total()
            share = f"all {total}" if number == total > 1 else f"{number} of {total}"
            yield f"{share} batches stayed as the collator made them: {reason}"


_counts: weakref.WeakKeyDictionary[Run, BatchCount] = weakref.WeakKeyDictionary()


def count_of(run: Run) -> BatchCount:
    """The count of ``run``, empty at first."""
    return _counts.setdefault(run, BatchCount())


def count_packed(run: Run, metadata: PackedMetadata) -> None:
    """Add one packed training batch to the report, with host numbers only."""
    count, metrics = count_of(run), run.report.features["packing"].metrics
    if not count.is_new(metadata):
        return
    count.packed += 1
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
    measure_token_budget(run, metadata)


def count_unpacked(run: Run, reason: str, batch: object | None, *, complain: bool = True) -> None:
    """Add one training batch that was not packed to the report; warn of the first.

    Args:
        batch: an object that stands for the batch, so that it is counted once; None if there is none.
        complain: False where the caller itself sees to it that packing is switched off.

    Raises:
        FastFTError: if packing was asked for, by "on" or ``strict=True``.
    """
    count, metrics = count_of(run), run.report.features["packing"].metrics
    if batch is not None and not count.is_new(batch):
        return
    count.reasons[reason] += 1
    metrics["unpacked_batches"] = metrics.get("unpacked_batches", 0) + 1
    if complain and not count.has_complained:
        count.has_complained = True
        run.fall_short("packing", Declined(f"a batch stayed as the collator made it: {reason}"))
