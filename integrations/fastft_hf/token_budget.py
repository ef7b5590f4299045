"""Lets the Trainer's train dataloader form its batches by a number of tokens."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers import Trainer

from fastft_hf import foreign
from fastft_hf.lengths import lengths_of
from fastft_plugins.errors import Declined, FastFTError
from fastft_plugins.packing.token_batches import TokenBatchSampler, TokenBatchStream
from fastft_plugins.packing.token_budget import decline_token_budget
from fastft_plugins.run import Run

# What a DataLoader was made with, apart from where its batches come from.
_KEPT = (
    "collate_fn",
    "generator",
    "in_order",
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "pin_memory_device",
    "prefetch_factor",
    "timeout",
    "worker_init_fn",
)


def inject_token_budget(run: Run) -> None:
    """Make the Trainer's next train dataloaders hold ``max_tokens_per_batch``, where that can be done exactly.

    Raises:
        FastFTError: under ``packing="on"`` or ``strict=True``, if it cannot be done.
    """
    trainer = run.target.trainer
    try:
        if run.target.train_dataloader is not None:
            raise Declined(
                "the Trainer has planned its steps already; give it FastFTCallback when it is made (callbacks=[...]), "
                "or train inside apply(trainer, config)"
            )
        _check_trainer(trainer)
    except Declined as declined:
        decline_token_budget(run, str(declined))
        return
    run_ref, make_loader = weakref.ref(run), trainer.get_train_dataloader

    @functools.wraps(make_loader)
    def get_train_dataloader(*args: Any, **kwargs: Any) -> Any:
        loader, run = make_loader(*args, **kwargs), run_ref()
        return loader if run is None or not run.active else _with_budget(run, loader)

    run.ledger.setattr(trainer, "get_train_dataloader", get_train_dataloader)
    run.token_budget = run.config.max_tokens_per_batch


def _with_budget(run: Run, loader: Any) -> Any:
    """The loader to use in place of ``loader``: itself, where it has to keep its batches."""
    budget, entry = run.token_budget, run.report.features["packing"]
    if budget is None:
        return loader
    try:
        if not entry.enabled:
            raise Declined("packing is off in this run")
        made, batches = _by_tokens(loader, budget, run.target.trainer)
    except Declined as declined:
        decline_token_budget(run, str(declined))
        return loader
    note = (
        f"batches hold up to {budget:,} tokens in place of {run.target.trainer._train_batch_size} documents: {batches}"
    )
    if note not in entry.changes:
        entry.changes.append(note)
    return made


def _by_tokens(loader: Any, budget: int, trainer: Trainer) -> tuple[DataLoaderShard, str]:
    """The loader that forms its batches by tokens, and in words how many there are."""
    if type(loader).__name__ == "DataLoaderDispatcher":
        raise Declined(
            "one process reads the stream and dispatches rows; set accelerator_config={'dispatch_batches': False}"
        )
    if type(loader) is not DataLoaderShard or type(loader.base_dataloader) is not DataLoader:
        base = getattr(loader, "base_dataloader", loader)
        raise Declined(f"the train dataloader is a {type(base).__name__}, which only its own kind can make anew")
    base = loader.base_dataloader
    if isinstance(base.dataset, IterableDataset):
        return _stream(loader, budget, trainer), "as many as the stream fills"
    made = _remade(loader, base.dataset, batch_sampler=_batch_sampler(base, budget))
    return made, f"{len(made)} an epoch"


def _stream(loader: DataLoaderShard, budget: int, trainer: Trainer) -> DataLoaderShard:
    if trainer.accelerator.num_processes > 1:
        raise Declined("with a stream, several processes would not have the same number of batches")
    if trainer.args.max_steps <= 0:
        raise Declined("nobody knows how many batches the stream fills, so the steps cannot be planned; set max_steps")
    return _remade(loader, TokenBatchStream(loader.base_dataloader.dataset, budget), batch_size=None)


def _batch_sampler(base: DataLoader[Any], budget: int) -> TokenBatchSampler:
    batch_sampler: Any = base.batch_sampler
    process = (0, 1)
    if isinstance(batch_sampler, BatchSamplerShard):
        process = (batch_sampler.process_index, batch_sampler.num_processes)
        batch_sampler = batch_sampler.batch_sampler
    if type(batch_sampler) is not BatchSampler:
        raise Declined(f"{type(batch_sampler).__name__} forms the batches in a way of its own")
    sampler = batch_sampler.sampler
    if type(sampler).__name__ in ("LengthGroupedSampler", "DistributedLengthGroupedSampler"):
        raise Declined("group_by_length has ordered the documents for batches of per_device_train_batch_size")
    if not _is_permutation(sampler, len(base.dataset)):  # type: ignore[arg-type]
        raise Declined(
            f"{type(sampler).__name__} may draw other documents in each epoch, or not all, so steps cannot be planned"
        )
    try:
        return TokenBatchSampler(sampler, lengths_of(base.dataset), budget, process)
    except (FastFTError, ValueError) as problem:
        raise Declined(str(problem)) from problem


def _is_permutation(sampler: Any, count: int) -> bool:
    """Whether ``sampler`` is known to draw each of ``count`` documents once an epoch."""
    if type(sampler) is SequentialSampler:
        return len(sampler) == count  # it may be one of a part of the dataset
    is_random = type(sampler) in (RandomSampler, SeedableRandomSampler)
    return is_random and not sampler.replacement and sampler.num_samples == count


def _remade(loader: DataLoaderShard, dataset: Any, **source: Any) -> DataLoaderShard:
    """A loader like ``loader`` whose batches come from elsewhere; torch lets nobody change that in a loader itself."""
    base = loader.base_dataloader
    kept = {name: getattr(base, name) for name in _KEPT if hasattr(base, name)}
    return DataLoaderShard(
        dataset,
        device=loader.device,
        rng_types=loader.rng_types,
        synchronized_generator=loader.synchronized_generator,
        _non_blocking=loader._non_blocking,
        **kept,
        **source,
    )


def _check_trainer(trainer: Trainer) -> None:
    for name in ("get_train_dataloader", "_get_dataloader"):
        method = getattr(trainer, name)
        if foreign.home_of(getattr(method, "__func__", method)) != "transformers.trainer":
            raise Declined(f"{name} is overridden: the train dataloader is your own")
    if trainer.args.dataloader_drop_last:
        raise Declined("dataloader_drop_last drops a batch of too few documents, and here none has a number of them")
    if trainer.args.auto_find_batch_size:
        raise Declined("auto_find_batch_size looks for a number of documents, which would change nothing here")
