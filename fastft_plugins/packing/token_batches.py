"""What a torch `DataLoader` draws batches of at most some number of tokens from: a batch sampler, or a stream."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, RandomSampler, Sampler

from fastft_plugins.errors import FastFTError
from fastft_plugins.packing.best_fit import BUFFER, best_fit, count_batches, plan


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of indices for a map-style dataset: every document that ``sampler`` draws is in one batch of one process.

    All epochs have the same number of batches, in all processes, so that a trainer can plan its steps.

    Args:
        sampler: draws each document of the dataset once an epoch, in the same order in every process.
        lengths: the tokens of each document.
        max_tokens: what a batch may hold; a longer document has a batch of its own.
        process: the number of this process, and of how many.

    Raises:
        ValueError: there are fewer documents than processes.
    """

    def __init__(
        self, sampler: Iterable[int], lengths: Sequence[int], max_tokens: int, process: tuple[int, int] = (0, 1)
    ) -> None:
        self.sampler = sampler  # by this name accelerate finds it, and tells it the epoch
        self._lengths = array("q", lengths)
        self._max_tokens = max_tokens
        self._rank, self._processes = process
        batches = count_batches(_typical_order(sampler, len(lengths)), self._lengths, max_tokens)
        self._per_process = -(-batches // self._processes)
        if self._per_process * self._processes > len(lengths):
            raise ValueError(
                f"lengths: {len(lengths)} documents cannot fill {self._per_process * self._processes} batches, the "
                f"same number in each of {self._processes} processes"
            )

    def __len__(self) -> int:
        return self._per_process

    def __iter__(self) -> Iterator[list[int]]:
        batches = plan(list(self.sampler), self._lengths, self._max_tokens, self._per_process * self._processes)
        yield from batches[self._rank :: self._processes]


def _typical_order(sampler: Iterable[int], count: int) -> list[int]:
    """An order like those of ``sampler``; asked itself, it might draw from the generator that training goes on with."""
    if isinstance(sampler, RandomSampler):
        return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return list(range(count))


class TokenBatchStream(IterableDataset[list[Any]]):
    """A stream of batches, lists of rows, for a `DataLoader` with ``batch_size=None``; each worker fills its own.

    Args:
        rows: the stream of rows to batch, whose epoch is set through this object.
        max_tokens: what a batch may hold; a longer document has a batch of its own.

    Raises:
        FastFTError: while it is iterated over, for a row without ``input_ids``.
    """

    def __init__(self, rows: Iterable[Any], max_tokens: int) -> None:
        self.rows = rows
        self._max_tokens = max_tokens

    def __iter__(self) -> Iterator[list[Any]]:
        return best_fit(self.rows, tokens_of, self._max_tokens, BUFFER)

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to a stream that shuffles by it."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def tokens_of(row: Any) -> int:
    """The real tokens of a dataset's row: those its ``attention_mask`` names, or the number of its ``input_ids``.

    Raises:
        FastFTError: it has no ``input_ids``.
    """
    mask = row.get("attention_mask") if isinstance(row, Mapping) else None
    if mask is not None:
        return int(mask.sum() if hasattr(mask, "sum") else sum(mask))
    if not isinstance(row, Mapping) or "input_ids" not in row:
        has = f"has {', '.join(map(repr, row))}" if isinstance(row, Mapping) else f"is a {type(row).__name__}"
        raise FastFTError(
            f"max_tokens_per_batch counts the input_ids of each row of the dataset, and a row {has}; tokenize before "
            "the collator, or leave max_tokens_per_batch out"
        )
    return len(row["input_ids"])
