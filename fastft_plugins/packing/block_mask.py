"""The block mask that torch's flex_attention takes for a packed row, made once a batch from the lengths on the host.

torch's own `create_block_mask` asks the mask function about every pair of tokens, on the device. Documents lie one
after another, so their lengths alone say which blocks are seen: a few operations on a table of blocks, and one copy.

Shape suffixes: T tokens, N blocks of `BLOCK` tokens; Q rows of query blocks and K columns of key blocks, N of each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from fastft_plugins.kernels import segments
from fastft_plugins.kernels.transfer import upload
from fastft_plugins.packing.metadata import PackedMetadata

BLOCK = 128  # tokens, flex_attention's own default
_ALIGNED = 32  # int32 numbers; compiled kernels first copy a tensor that begins elsewhere

_masks: weakref.WeakKeyDictionary[PackedMetadata, dict[int | None, BlockMask]] = weakref.WeakKeyDictionary()


def document_block_mask(metadata: PackedMetadata, window: int | None = None) -> BlockMask:
    """Which blocks of a row see which: causal, inside each document alone.

    Made at the first call for a window, and returned again as long as ``metadata`` lives. Nothing waits for a GPU. The
    mask must not hold the metadata, which would then never be gone.

    Args:
        metadata: the documents; the mask is on the device of its tensors.
        window: a token sees itself and the ``window - 1`` tokens before it. None: the whole document.

    Returns:
        A mask of shape ``[1, 1, T, T]`` with blocks of 128 tokens, as `create_block_mask` makes it.
    """
    if window is not None and window >= metadata.max_seqlen:
        window = None
    masks = _masks.setdefault(metadata, {})
    if window not in masks:
        masks[window] = _make(metadata, window)
    return masks[window]


def _make(metadata: PackedMetadata, window: int | None) -> BlockMask:
    seen_QK, whole_QK = _blocks(metadata, window)
    tables = [table for seen in (seen_QK & ~whole_QK, whole_QK) for table in (*_ordered(seen), *_ordered(seen.t()))]
    first_T, *tables = _together([_first_seen(metadata, window), *tables], metadata.seq_idx.device)
    kv, kv_at, q, q_at, whole_kv, whole_kv_at, whole_q, whole_q_at = (table[None, None] for table in tables)
    total = metadata.total_tokens
    return BlockMask(
        seq_lengths=(total, total),
        kv_num_blocks=kv,
        kv_indices=kv_at,
        full_kv_num_blocks=whole_kv,
        full_kv_indices=whole_kv_at,
        q_num_blocks=q,
        q_indices=q_at,
        full_q_num_blocks=whole_q,
        full_q_indices=whole_q_at,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask_function(first_T),
    )


def _first_seen(metadata: PackedMetadata, window: int | None) -> Tensor:
    """The first token that each one sees, ``[T]`` on the host."""
    reach_T = segments.positions(metadata.lengths)
    if window is not None:
        reach_T = reach_T.clamp(max=window - 1)
    return torch.arange(len(reach_T)) - reach_T


def _blocks(metadata: PackedMetadata, window: int | None) -> tuple[Tensor, Tensor]:
    """Two boolean ``[N, N]`` host tensors: blocks of which something is seen, and those that are seen as a whole."""
    total = metadata.total_tokens
    first_N = torch.arange(0, total, BLOCK)
    last_N = (first_N + BLOCK - 1).clamp(max=total - 1)
    ends = torch.tensor(metadata.lengths).cumsum(0)
    first_document_N, last_document_N = (torch.searchsorted(ends, token_N, right=True) for token_N in (first_N, last_N))
    block_N = torch.arange(len(first_N))
    is_before_QK, is_same_QK = block_N[:, None] > block_N, block_N[:, None] == block_N
    # An earlier block is seen through one document at most: the last that it holds, and the first of the queries'.
    seen_QK = is_same_QK | (is_before_QK & (last_document_N == first_document_N[:, None]))
    # Like torch, count a last block that the row does not fill as seen in part.
    is_filled_N = last_N - first_N == BLOCK - 1
    whole_QK = is_before_QK & (first_document_N == last_document_N[:, None]) & is_filled_N[:, None]
    if window is not None:
        seen_QK &= first_N[:, None] - last_N < window
        whole_QK &= last_N[:, None] - first_N < window
    return seen_QK, whole_QK


def _ordered(seen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row sees, ``[N]``, and its columns with those first, ``[N, N]``."""
    return seen_QK.sum(1), seen_QK.int().argsort(dim=1, descending=True, stable=True)


def _together(tables: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tables as int32 on ``device``, by one copy."""
    filled = [pad(table.flatten(), (0, -table.numel() % _ALIGNED)) for table in tables]
    (flat,) = upload([torch.cat(filled).int()], device)
    parts = flat.split([table.numel() for table in filled])
    return [part[: table.numel()].view(table.shape) for part, table in zip(parts, tables, strict=True)]


def _mask_function(first_T: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """One function for all windows: flex_attention is compiled anew for each other one, and soon no more at all."""

    def from_first_to_itself(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first_T[query] <= key) & (key <= query)

    return from_first_to_itself
