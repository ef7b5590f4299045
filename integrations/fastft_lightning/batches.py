"""The packed form of a batch travels beside the padded one, so that the user's hooks see what they always saw.

Shape suffixes: B rows, S padded length, T real tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from fastft_plugins.packing import METADATA_KEY, PackedMetadata
from fastft_plugins.packing.batch import PackedBatch
from fastft_plugins.packing.collator import PACKED_KEYS
from fastft_plugins.packing.metadata import NotPacked

# What a model's forward takes from a batch, and packing replaces.
MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "position_ids")
_OF_A_ROW = (*MODEL_INPUTS, *sorted(PACKED_KEYS), METADATA_KEY)


class Twin:
    """One batch's packed form. A plain class: Lightning takes mappings and dataclasses in a batch apart.

    Attributes:
        row: the keyword arguments for the model, metadata included; or the reason why the batch cannot be packed.
        inputs: the tensors of the padded batch that the row was made from.
        index_T: where each token of the row is in the flattened padded batch.
    """

    def __init__(self, row: dict[str, Any] | NotPacked, inputs: dict[str, Tensor], index_T: Tensor | None) -> None:
        self.row, self.inputs, self.index_T = row, inputs, index_T
        self._versions: dict[str, int] = {}

    @property
    def metadata(self) -> PackedMetadata | None:
        return None if isinstance(self.row, NotPacked) else self.row[METADATA_KEY]

    @property
    def came_packed(self) -> bool:
        """The user's own collator made rows of several documents."""
        return self.metadata is not None and "position_ids" in self.inputs and "attention_mask" not in self.inputs

    def pin_memory(self) -> Twin:
        """Called by a `DataLoader` with ``pin_memory=True``."""
        index_T = None if self.index_T is None else self.index_T.pin_memory()
        return Twin(_pinned(self.row), self.inputs, index_T)

    def matches(self, batch: Any) -> bool:
        """Whether the padded batch, still on the host, is the one this twin was made from."""
        return isinstance(batch, Mapping) and all(
            isinstance(value := batch.get(name), Tensor)
            and value.device == tensor.device
            and torch.equal(value, tensor)
            for name, tensor in self.inputs.items()
        )

    def follow(self, batch: Any) -> Twin:
        """The twin of ``batch`` after its move to the device; from here on its tensors are known by identity."""
        inputs = {name: batch[name] for name in self.inputs}
        if isinstance(self.row, NotPacked):  # perhaps of a batch without input_ids
            return Twin(self.row, inputs, None)
        assert self.index_T is not None
        device = batch["input_ids"].device
        index_T = self.index_T.to(device, non_blocking=True)
        moved = Twin(PackedBatch(self.row).to(device), inputs, index_T)
        moved._versions = {name: tensor._version for name, tensor in inputs.items()}
        return moved

    def changed_input(self, given: Mapping[str, Any]) -> str | None:
        """The first of the model's inputs that is not the batch's own tensor as it arrived."""
        for name in MODEL_INPUTS:
            own = self.inputs.get(name)
            if given.get(name) is not own or (own is not None and own._version != self._versions[name]):
                return name
        return None


class TwinCollator:
    """Wraps any collator: each batch it makes gets its `Twin` under ``fastft_metadata``, and stays what it was."""

    def __init__(self, inner: Any, wrap_collator: Callable[[Any], Any]) -> None:
        self.inner = inner
        self.pack = packer(wrap_collator)

    def __call__(self, features: Any) -> Any:
        batch = self.inner(features)
        if not isinstance(batch, MutableMapping):
            return batch
        twin = make_twin(batch, self.pack)
        batch = copy.copy(batch)
        batch[METADATA_KEY] = twin  # in place of what a padding-free collator of the user's own put there
        return batch


def make_twin(batch: Mapping[str, Any], pack: Callable[[Any], Any]) -> Twin:
    """The twin of a batch, where its tensors are; ``pack`` turns a padded batch into a row."""
    # Of the other columns training_step gives the model none, or its call is refused.
    packed = pack({name: batch[name] for name in _OF_A_ROW if name in batch})
    metadata = packed[METADATA_KEY]
    inputs = {name: batch[name] for name in MODEL_INPUTS if isinstance(batch.get(name), Tensor)}
    if isinstance(metadata, NotPacked):
        return Twin(metadata, inputs, None)
    mask = inputs.get("attention_mask")
    index_T = torch.arange(metadata.total_tokens) if mask is None else mask.flatten().nonzero().flatten()
    return Twin(dict(packed), inputs, index_T)


def take_twins(batch: Any, path: tuple[Any, ...] = ()) -> tuple[Any, dict[tuple[Any, ...], Twin]]:
    """Return the batch without its twins, and the twins by where they were: several loaders make a nested batch."""
    if isinstance(batch, MutableMapping):
        if isinstance(batch.get(METADATA_KEY), Twin):
            batch = copy.copy(batch)
            return batch, {path: batch.pop(METADATA_KEY)}
        children = [(key, take_twins(value, (*path, key))) for key, value in batch.items()]
    elif type(batch) in (list, tuple):
        children = [(index, take_twins(value, (*path, index))) for index, value in enumerate(batch)]
    else:
        return batch, {}
    twins = {place: twin for _, (_, found) in children for place, twin in found.items()}
    if not twins:
        return batch, {}
    if isinstance(batch, MutableMapping):
        batch = copy.copy(batch)
        batch.update({key: child for key, (child, _) in children})
        return batch, twins
    return type(batch)(child for _, (child, _) in children), twins


def at(batch: Any, path: tuple[Any, ...]) -> Any:
    """The part of a nested batch that `take_twins` found at ``path``; None if it is no longer there."""
    for key in path:
        try:
            batch = batch[key]
        except (KeyError, IndexError, TypeError):
            return None
    return batch


def place_of(tensor: Tensor, batch: Any) -> tuple[Any, ...] | None:
    """The path to this very tensor in a batch of mappings and sequences, for `at`; None if it is not there."""
    if batch is tensor:
        return ()
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(batch, Mapping):
        children = batch.items()
    elif isinstance(batch, (list, tuple)):
        children = enumerate(batch)
    for key, child in children:
        path = place_of(tensor, child)
        if path is not None:
            return (key, *path)
    return None


def packer(wrap_collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What turns a padded batch into a row, given what turns a collator of padded batches into one of rows."""
    return wrap_collator(_as_it_is)  # type: ignore[no-any-return]


def _as_it_is(batch: Any) -> Any:
    return batch


def _pinned(row: dict[str, Any] | NotPacked) -> dict[str, Any] | NotPacked:
    if isinstance(row, NotPacked):
        return row
    return {
        name: value.pin_memory() if isinstance(value, (Tensor, PackedMetadata)) else value
        for name, value in row.items()
    }
