"""Turns a collator's padded batch into one packed row, in the dataloader's worker.

Shape suffixes: B rows, S padded length, T real tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from fastft_plugins.kernels import segments
from fastft_plugins.packing.batch import PackedBatch, flash_columns
from fastft_plugins.packing.metadata import NotPacked, PackedMetadata

METADATA_KEY = "fastft_metadata"
IGNORE_INDEX = -100  # the label that transformers' and torch's losses skip

_PADDED_KEYS = {"input_ids", "attention_mask", "labels", "position_ids"}
# One number per token that follows its token. Stock models do not read these, except the two that are checked.
_TOKEN_KEYS = ("token_type_ids", "shift_labels", "special_tokens_mask", "completion_mask", "assistant_masks")
PACKED_KEYS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class _Keep(Exception):
    """The batch cannot be packed exactly; the argument is the reason."""


class PaddingFreeCollator:
    """Wraps any collator: its padded ``[B, S]`` batch becomes one ``[1, T]`` row of documents without padding.

    The row carries ``position_ids``, ``cu_seq_lens_q/k`` (int32 ``[N + 1]``), ``max_length_q/k`` (int), ``seq_idx``
    (int32 ``[1, T]``) and a `PackedMetadata` under ``fastft_metadata``. Labels stay as the collator made them, except
    that the first label of each document becomes -100: no token of the document predicts it. Other columns of one
    number per token follow their tokens where their meaning is known. A batch that is already packed (one row,
    ``position_ids`` that restart) only gets its metadata. A batch that cannot be packed exactly is returned as it is,
    with the reason under ``fastft_metadata``.

    The row is meant for a model inside a run that packs; `Run.collator` uses this class only there. In a run with
    packing off or declined it raises `FastFTError` when it reaches the model. Without any run nobody looks: it is then
    what transformers' own flattening collator makes. FlashAttention keeps its documents apart; with other attention
    only ``use_cache=False`` does, and only in models that transformers can feed packed rows. Others mix the documents
    without a word. So keep such a loader inside the block of `apply`, and give a plain Trainer the padding collator.

    Args:
        inner: the collator to wrap.
        move_positions: whether a document may start at another position than in the padded batch. Left padding moves
            positions; False keeps such batches padded, for models in which a position counts by itself.
        flash_arguments: whether the row has ``cu_seq_lens``, ``max_length`` and ``seq_idx``, which only stock's own
            packed layers read. The ints among them have no ``.to``, and break loops that move each value by itself.

    Attributes:
        packs: False has ``inner``'s batches pass as they are; the end of its run sets that on a `Run.collator`.
    """

    def __init__(self, inner: Any, *, move_positions: bool = True, flash_arguments: bool = True) -> None:
        self.inner = inner
        self.move_positions = move_positions
        self.flash_arguments = flash_arguments
        self.packs = True

    def __call__(self, features: Any) -> Any:
        batch = self.inner(features)
        if not self.packs or not isinstance(batch, MutableMapping) or METADATA_KEY in batch:
            return batch
        try:
            row = _pack(batch)
            if row[METADATA_KEY].moved_positions and not self.move_positions:
                raise _Keep("padding before a document moves its positions, which this model notices")
            if not self.flash_arguments:
                for name in PACKED_KEYS:
                    del row[name]
            return row
        except _Keep as reason:
            batch = copy.copy(batch)  # it may be the user's own object, used again
            batch[METADATA_KEY] = NotPacked(str(reason))
            return batch


def _pack(batch: Mapping[str, Any]) -> PackedBatch:
    unknown = sorted(set(batch) - _PADDED_KEYS - PACKED_KEYS - set(_TOKEN_KEYS))
    if unknown:
        raise _Keep(f"column '{unknown[0]}' is not one that packing understands")
    ids_BS, labels_BS = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids_BS, Tensor) or ids_BS.dim() != 2 or ids_BS.numel() == 0:
        raise _Keep("no two-dimensional tensor input_ids in the batch")
    if not isinstance(labels_BS, Tensor):
        raise _Keep("no labels in the batch")
    for name in ("labels", "attention_mask", "position_ids", *_TOKEN_KEYS):
        column = batch.get(name)
        if column is not None and (not isinstance(column, Tensor) or column.shape != ids_BS.shape):
            raise _Keep(f"{name} does not have the shape of input_ids")
        if column is not None and column.device != ids_BS.device:
            raise _Keep(f"{name} is on another device than input_ids")
    mask, position_ids_BS = batch.get("attention_mask"), batch.get("position_ids")
    columns = {name: batch[name] for name in _TOKEN_KEYS if batch.get(name) is not None}
    if "token_type_ids" in columns and bool(columns["token_type_ids"].any()):
        raise _Keep("token_type_ids other than 0, which some models read as another attention mask")
    if mask is None and position_ids_BS is not None:
        return _pack_rows(ids_BS, labels_BS, position_ids_BS, columns)
    real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask is None else _real_tokens(mask)
    for name in ("labels", "shift_labels"):
        if batch.get(name) is not None and bool(((batch[name] != IGNORE_INDEX) & ~real_BS).any()):
            raise _Keep(f"{name} on padding positions, which stock training counts")
    return _pack_padded(ids_BS, labels_BS, real_BS, position_ids_BS, columns)


def _real_tokens(mask_BS: Tensor) -> Tensor:
    if not bool(((mask_BS == 0) | (mask_BS == 1)).all()):
        raise _Keep("attention_mask holds values other than 0 and 1")
    real_BS = mask_BS.bool()
    before_BS = torch.nn.functional.pad(real_BS[:, :-1], (1, 0))
    runs_B = (real_BS & ~before_BS).sum(1)
    if bool((runs_B == 0).any()):
        raise _Keep("a row is all padding")
    if bool((runs_B > 1).any()):
        raise _Keep("attention_mask has holes")
    return real_BS


def _pack_padded(
    ids_BS: Tensor, labels_BS: Tensor, real_BS: Tensor, position_ids_BS: Tensor | None, columns: dict[str, Tensor]
) -> PackedBatch:
    if position_ids_BS is not None:
        steps_BS = position_ids_BS.diff(dim=1) == 1
        if not bool((steps_BS | ~(real_BS[:, 1:] & real_BS[:, :-1])).all()):
            raise _Keep("position_ids jump inside a row that has an attention_mask: stock attends across the jump")
    lengths_B = real_BS.sum(1)
    first_B = real_BS.int().argmax(1)
    first_label_B = labels_BS.gather(1, first_B[:, None]).squeeze(1)
    first_position_B = first_B if position_ids_BS is None else position_ids_BS.gather(1, first_B[:, None])
    metadata = PackedMetadata.from_lengths(
        lengths_B.tolist(),
        padded_tokens=ids_BS.numel(),
        # Stock never trains column 0. A first label further right is predicted from padding: it cannot be kept.
        dropped_labels=int(((first_label_B != IGNORE_INDEX) & (first_B > 0)).sum()),
        moved_positions=bool(first_position_B.any()),
    )
    # Not column_BS[real_BS]: on a CPU, indexing with a mask wakes all threads, which takes longer than the copy.
    real_T = real_BS.flatten().nonzero().flatten()
    ids_T, labels_T = _select(ids_BS, real_T), _select(labels_BS, real_T)
    labels_T.index_fill_(0, metadata.cu_seqlens[:-1].to(labels_T.device, torch.int64), IGNORE_INDEX)
    if metadata.dropped_labels and not bool((labels_T != IGNORE_INDEX).any()):
        raise _Keep("its only labels are first labels of left-padded rows, which a packed row has to drop")
    columns_T = {name: _select(column_BS, real_T) for name, column_BS in columns.items()}
    return _row(ids_T, labels_T, metadata.position_ids, metadata, columns_T)


def _select(column_BS: Tensor, real_T: Tensor) -> Tensor:
    """The elements with these numbers, counted through the rows."""
    return column_BS.flatten().index_select(0, real_T)


def _pack_rows(ids_BS: Tensor, labels_BS: Tensor, position_ids_BS: Tensor, columns: dict[str, Tensor]) -> PackedBatch:
    """Rows without a mask whose position_ids say where documents start: what stock itself takes for packed."""
    starts_BS = torch.ones_like(position_ids_BS, dtype=torch.bool)
    starts_BS[:, 1:] = position_ids_BS.diff(dim=1) != 1
    columns_T = {name: column_BS.flatten() for name, column_BS in columns.items()}
    if ids_BS.shape[0] == 1:
        position_ids_BS = _join_filling(ids_BS[0], labels_BS[0], position_ids_BS[0], starts_BS[0])[None]
    metadata = PackedMetadata.from_lengths(
        segments.lengths_of(starts_BS.flatten().cpu()),
        moved_positions=ids_BS.shape[0] > 1 and bool(position_ids_BS[starts_BS].any()),
    )
    if ids_BS.shape[0] == 1:  # already one row: ids, labels and positions stay bit for bit
        # A copy: no trace of how the positions were made, and whoever changes them later leaves one.
        return _row(ids_BS[0], labels_BS[0], position_ids_BS[0].clone(), metadata, columns_T)
    labels_BS = labels_BS.clone()
    labels_BS[:, 0] = IGNORE_INDEX  # stock shifts the labels row by row, so it never trains column 0
    return _row(ids_BS.flatten(), labels_BS.flatten(), metadata.position_ids, metadata, columns_T)


def _join_filling(ids_T: Tensor, labels_T: Tensor, position_ids_T: Tensor, starts_T: Tensor) -> Tensor:
    """Make the tokens that fill a row up to some multiple one document: returns new positions, changes ``starts_T``.

    TRL's ``pad_to_multiple_of`` gives each of them the position 0, so that stock takes it for a document of its own,
    and attention would go over them one by one. No loss is read from them. As one document they stay what they were,
    too, which a router's auxiliary loss sees: equal tokens have equal values, and without attention sinks their mean
    does not depend on how many there are or how far apart.
    """
    is_filling_T = starts_T & (labels_T == IGNORE_INDEX) & (ids_T == ids_T[-1])
    count = int(is_filling_T.flip(0).int().cumprod(0).sum())
    if count < 2:
        return position_ids_T
    starts_T[-count + 1 :] = False
    filling = torch.arange(count, dtype=position_ids_T.dtype, device=position_ids_T.device)
    return torch.cat([position_ids_T[:-count], filling])


def _row(
    ids_T: Tensor, labels_T: Tensor, position_ids_T: Tensor, metadata: PackedMetadata, columns_T: dict[str, Tensor]
) -> PackedBatch:
    metadata = metadata.to(ids_T.device)  # of a collator that makes its batches on the GPU
    return PackedBatch(
        {
            "input_ids": ids_T[None],
            "labels": labels_T[None],
            "position_ids": position_ids_T.to(ids_T.device)[None],
            **flash_columns(metadata),
            **{name: column_T[None] for name, column_T in columns_T.items()},
            METADATA_KEY: metadata,
        }
    )
