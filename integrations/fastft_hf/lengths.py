"""How many tokens each document of a map-style dataset has."""

from __future__ import annotations

from typing import Any

from transformers.utils import is_datasets_available

from fastft_plugins.packing.token_batches import tokens_of

_ROWS = 10_000  # read at a time


def lengths_of(dataset: Any) -> list[int]:
    """The real tokens of each row, in the dataset's order, counted before the collator.

    A `datasets.Dataset` is asked for one column. Of any other dataset, and of one that makes its rows by a transform,
    every row is read once, as transformers does for ``group_by_length``.

    Raises:
        FastFTError: a row has no ``input_ids``.
    """
    if is_datasets_available():
        import datasets

        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
            return _of_columns(dataset)
    return [tokens_of(dataset[index]) for index in range(len(dataset))]


def _of_columns(dataset: Any) -> list[int]:
    """Counts in what the collator is given: a format may leave columns out, and a row may have None for a mask."""
    given = dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"]
    names = [name for name in ("attention_mask", "input_ids") if name in given]
    is_plain = bool(names) and not dataset.data.column(names[0]).null_count
    columns = dataset.select_columns(names[:1] if is_plain else names or given)
    return [
        tokens_of(dict(zip(batch, row, strict=True)))
        for batch in columns.with_format("numpy" if is_plain else None).iter(batch_size=_ROWS)  # numpy fails on None
        for row in zip(*batch.values(), strict=True)
    ]
