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
    names = [name for name in ("attention_mask", "input_ids") if name in dataset.column_names][:1]
    columns = dataset.select_columns(names or dataset.column_names).with_format("numpy")
    return [
        tokens_of(dict(zip(batch, row, strict=True)))
        for batch in columns.iter(batch_size=_ROWS)
        for row in zip(*batch.values(), strict=True)
    ]
