"""What a packed row knows of its documents: values, dtypes, travel between devices and processes, and errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_plugins.packing import PackedMetadata
from fastft_plugins.packing.metadata import NotPacked

TENSORS = ("cu_seqlens", "position_ids", "seq_idx")
some_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def assert_same(one: PackedMetadata, other: PackedMetadata) -> None:
    assert (one.lengths, one.max_seqlen) == (other.lengths, other.max_seqlen)
    assert (one.padded_tokens, one.dropped_labels) == (other.padded_tokens, other.dropped_labels)
    for name in TENSORS:
        assert getattr(one, name).dtype == getattr(other, name).dtype
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_values_of_three_documents():
    metadata = PackedMetadata.from_lengths([3, 2, 4])
    assert metadata.lengths == (3, 2, 4)
    assert metadata.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert metadata.max_seqlen == 4
    assert metadata.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert metadata.seq_idx.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert metadata.total_tokens == 9


def test_dtypes_are_those_that_attention_kernels_and_transformers_take():
    metadata = PackedMetadata.from_lengths([3, 2])
    assert metadata.cu_seqlens.dtype == torch.int32
    assert metadata.position_ids.dtype == torch.int64
    assert metadata.seq_idx.dtype == torch.int32
    assert type(metadata.max_seqlen) is int and all(type(length) is int for length in metadata.lengths)


@settings(deadline=None, max_examples=100)
@given(some_lengths)
def test_random_lengths_match_counting_token_by_token(lengths):
    starts, positions, documents = [0], [], []
    for document, length in enumerate(lengths):
        for position in range(length):
            positions.append(position)
            documents.append(document)
        starts.append(len(positions))
    metadata = PackedMetadata.from_lengths(lengths)
    assert metadata.lengths == tuple(lengths)
    assert metadata.cu_seqlens.tolist() == starts
    assert metadata.position_ids.tolist() == positions
    assert metadata.seq_idx.tolist() == documents
    assert metadata.max_seqlen == max(lengths)
    assert metadata.total_tokens == len(positions)


@pytest.mark.parametrize("as_given", [tuple, torch.tensor, lambda lengths: torch.tensor(lengths, dtype=torch.int32)])
def test_lengths_may_be_any_sequence_of_integers(as_given):
    assert_same(PackedMetadata.from_lengths(as_given([3, 2])), PackedMetadata.from_lengths([3, 2]))


def test_padding_counts_default_to_a_row_that_replaced_nothing():
    metadata = PackedMetadata.from_lengths([3, 2])
    assert (metadata.padded_tokens, metadata.dropped_labels) == (5, 0)


def test_padding_counts_are_kept():
    metadata = PackedMetadata.from_lengths([3, 2], padded_tokens=6, dropped_labels=1)
    assert (metadata.padded_tokens, metadata.dropped_labels) == (6, 1)


def test_to_moves_the_tensors_and_keeps_the_lengths_on_the_host():
    metadata = PackedMetadata.from_lengths([3, 2], padded_tokens=8, dropped_labels=1)
    moved = metadata.to("meta")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert (moved.lengths, moved.max_seqlen, moved.total_tokens) == ((3, 2), 3, 5)
    assert (moved.padded_tokens, moved.dropped_labels) == (8, 1)
    assert metadata.cu_seqlens.device.type == "cpu"


def test_to_takes_what_trainers_pass():
    metadata = PackedMetadata.from_lengths([3, 2])
    assert_same(metadata.to(torch.device("cpu"), non_blocking=True), metadata)


def test_to_the_device_it_is_on_is_no_copy():
    """What is made once a batch, a block mask, is kept for this very object, and hooks move it before every layer."""
    metadata = PackedMetadata.from_lengths([3, 2])
    moved = metadata.to("meta")
    assert metadata.to("cpu") is metadata and moved.to(torch.device("meta")) is moved
    assert moved is not metadata


def test_accelerate_moves_it_inside_a_batch():
    send_to_device = pytest.importorskip("accelerate.utils").send_to_device
    batch = {"fastft_metadata": PackedMetadata.from_lengths([3, 2]), "other": NotPacked("holes")}
    moved = send_to_device(batch, torch.device("meta"))
    assert moved["fastft_metadata"].cu_seqlens.device.type == "meta"
    assert moved["other"].reason == "holes"


def test_pickling_keeps_everything():
    metadata = PackedMetadata.from_lengths([3, 2, 4], padded_tokens=12, dropped_labels=2)
    assert_same(pickle.loads(pickle.dumps(metadata)), metadata)


def test_dataloader_workers_send_it():
    loader = torch.utils.data.DataLoader(
        [[3, 2], [1]], batch_size=None, collate_fn=PackedMetadata.from_lengths, num_workers=1
    )
    for metadata, lengths in zip(loader, ([3, 2], [1]), strict=True):
        assert_same(metadata, PackedMetadata.from_lengths(lengths))


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        PackedMetadata.from_lengths([3]).lengths = (4,)


@pytest.mark.parametrize(
    ("lengths", "field", "value", "remedy"),
    [
        ([], "lengths", "empty", "at least one document"),
        ([3, 0, 2], r"lengths\[1\]", "is 0", "drop empty ones"),
        ([3, 2, -4], r"lengths\[2\]", "is -4", "at least one token"),
        ([2**30, 2**30], "lengths", str(2**31), r"fewer than 2\*\*31 tokens"),
    ],
)
def test_bad_lengths_are_refused_with_field_value_and_remedy(lengths, field, value, remedy):
    with pytest.raises(ValueError, match=f"(?s){field}.*{value}.*{remedy}"):
        PackedMetadata.from_lengths(lengths)
