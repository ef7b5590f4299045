"""Puts a collator around the one of a torch `DataLoader`, for the time of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from fastft_plugins.errors import Declined
from fastft_plugins.packing.token_batches import TokenBatchStream

if TYPE_CHECKING:
    from fastft_plugins.run import Run


def wrap_dataloader(run: Run, loader: Any, wrap_collator: Callable[[Any], Any]) -> None:
    """Make ``loader`` collate with ``wrap_collator(its collator)`` until ``run`` ends.

    Raises:
        Declined: if ``loader`` has no collator that makes batches.
    """
    if not isinstance(loader, DataLoader) or not _collates(loader):
        raise Declined(f"{type(loader).__name__} is not a torch DataLoader with a collator")
    collator = wrap_collator(loader.collate_fn)
    if isinstance(loader.collate_fn, type(collator)):
        return  # already wrapped, or the user's own padding-free collator
    _restart_workers(loader)
    run.ledger.record("persistent dataloader workers", functools.partial(_restart_workers, loader))
    run.ledger.setattr(loader, "collate_fn", collator)


def _collates(loader: DataLoader[Any]) -> bool:
    """Whether the collator is given the rows of a batch, not one row at a time."""
    has_batches = loader.batch_size is not None or loader.batch_sampler is not None
    return has_batches or isinstance(loader.dataset, TokenBatchStream)


def _restart_workers(loader: DataLoader[Any]) -> None:
    """Persistent workers keep the collator they were started with; without an iterator the loader starts new ones."""
    if loader.persistent_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        loader._iterator = None
