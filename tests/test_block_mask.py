"""The block mask made from lengths is the one that torch finds by asking about every pair of tokens."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from fastft_plugins.packing import PackedMetadata
from fastft_plugins.packing.block_mask import document_block_mask

TABLES = [
    f"{prefix}{side}_{what}" for prefix in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
]


def torchs_own(lengths, window):
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def sees(batch, head, query, key):
        seen = (documents[query] == documents[key]) & (query >= key)
        return seen if window is None else seen & (query - key < window)

    return create_block_mask(sees, 1, None, sum(lengths), sum(lengths), device="cpu")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([1, 3, 50, 127, 128, 129, 256, 300, 700]), min_size=1, max_size=8),
    st.sampled_from([None, 1, 2, 100, 128, 129, 255, 256, 257, 1000]),
)
def test_every_table_is_torchs_own(lengths, window):
    ours, expected = document_block_mask(PackedMetadata.from_lengths(lengths), window), torchs_own(lengths, window)
    assert ours.shape == expected.shape and ours.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in TABLES:
        table, truth = getattr(ours, name), getattr(expected, name)
        assert table.dtype == truth.dtype and torch.equal(table, truth), name
    token = torch.arange(sum(lengths))
    pairs = (torch.tensor(0), torch.tensor(0), token[:, None], token[None, :])
    assert torch.equal(ours.mask_mod(*pairs), expected.mask_mod(*pairs))


def test_one_mask_for_each_batch_and_window():
    metadata, other = PackedMetadata.from_lengths([300, 20]), PackedMetadata.from_lengths([300, 20])
    whole, narrow = document_block_mask(metadata), document_block_mask(metadata, 7)
    assert document_block_mask(metadata, None) is whole and document_block_mask(metadata, 7) is narrow is not whole
    assert document_block_mask(metadata, 300) is whole, "a window as long as the documents hides nothing"
    assert document_block_mask(other) is not whole


def test_a_mask_is_gone_with_its_batch():
    metadata = PackedMetadata.from_lengths([300, 20])
    mask, gone = document_block_mask(metadata), weakref.ref(metadata)
    del metadata
    gc.collect()
    assert gone() is None and mask.shape == (1, 1, 320, 320)


@pytest.mark.parametrize("window", [None, 64])
def test_memory_grows_with_blocks_and_not_with_tokens(window):
    """A row of 32,768 tokens has a table of 256 blocks; a mask of its tokens would be 1 GiB."""
    mask = document_block_mask(PackedMetadata.from_lengths([1024] * 32), window)
    assert max(getattr(mask, name).numel() for name in TABLES) == 256**2
