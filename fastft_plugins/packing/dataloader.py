"""Puts a collator around the one of a torch `DataLoader`, for the time of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from fastft_plugins.errors import Declined

if TYPE_CHECKING:
    from fastft_plugins.run import Run


def wrap_dataloader(run: Run, loader: Any, wrap_collator: Callable[[Any], Any]) -> None:
    """Make ``loader`` collate with ``wrap_collator(its collator)`` until ``run`` ends.

    Raises:
        Declined: if ``loader`` has no collator that makes batches.
    """
    if not isinstance(loader, DataLoader) or (loader.batch_size is None and loader.batch_sampler is None):
        raise Declined(f"{type(loader).__name__} is not a torch DataLoader with a collator")
    collator = wrap_collator(loader.collate_fn)
    if isinstance(loader.collate_fn, type(collator)):
        return  # already wrapped, or the user's own padding-free collator
    _restart_workers(loader)
    run.ledger.record("persistent dataloader workers", functools.partial(_restart_workers, loader))
    run.ledger.setattr(loader, "collate_fn", collator)


def _restart_workers(loader: DataLoader[Any]) -> None:
    """Persistent workers keep the collator they were started with; without an iterator the loader starts new ones."""
    if loader.persistent_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        loader._iterator = None
