"""Columns beside ids, mask and labels: what is known of each token follows it, anything else keeps a batch padded."""

from __future__ import annotations

import pytest
import torch

from fastft_plugins.packing import METADATA_KEY, PaddingFreeCollator

IGNORE = -100
RIGHT = {
    "input_ids": [[11, 12, 13, 0], [21, 22, 0, 0]],
    "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0]],
    "labels": [[11, 12, 13, IGNORE], [21, 22, IGNORE, IGNORE]],
}
LEFT = {name: [row[::-1] for row in rows] for name, rows in RIGHT.items()}
SHIFTED = {"shift_labels": [[12, 13, IGNORE, IGNORE], [22, IGNORE, IGNORE, IGNORE]]}


def pack(batch, **options):
    tensors = {name: torch.tensor(rows) for name, rows in batch.items()}
    return PaddingFreeCollator(lambda batch: batch, **options)(tensors)


@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks", "special_tokens_mask"])
def test_masks_over_tokens_follow_their_tokens(name):
    row = pack({**RIGHT, name: [[0, 1, 1, 0], [1, 0, 0, 0]]})
    assert row[name].tolist() == [[0, 1, 1, 1, 0]]


def test_masks_over_tokens_of_rows_that_are_packed_already():
    batch = {
        "input_ids": [[1, 2, 3]],
        "labels": [[1, 2, 3]],
        "position_ids": [[0, 1, 0]],
        "completion_mask": [[0, 1, 1]],
    }
    assert pack(batch)["completion_mask"].tolist() == [[0, 1, 1]]


def test_token_types_of_a_single_segment_are_kept():
    assert pack({**RIGHT, "token_type_ids": [[0] * 4] * 2})["token_type_ids"].tolist() == [[0] * 5]


def test_token_types_of_several_segments_keep_the_batch_padded():
    row = pack({**RIGHT, "token_type_ids": [[0, 1, 1, 0], [0] * 4]})
    assert "token_type_ids other than 0" in row[METADATA_KEY].reason


def test_a_second_column_of_labels_that_is_shifted_already_keeps_its_first_labels():
    row = pack({**RIGHT, **SHIFTED})
    assert row["shift_labels"].tolist() == [[12, 13, IGNORE, 22, IGNORE]]
    assert row["labels"].tolist() == [[IGNORE, 12, 13, IGNORE, 22]]


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_on_padding_keep_the_batch_padded(name):
    batch = {**RIGHT, **SHIFTED}
    batch[name] = [[1, 2, 3, 4], [1, 2, IGNORE, IGNORE]]
    assert f"{name} on padding positions" in pack(batch)[METADATA_KEY].reason


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("pixel_values", [[0.0] * 4] * 2),
        ("labels_of_another_head", [[1] * 4] * 2),
        ("mm_token_type_ids", [[0] * 4] * 2),
        ("inputs_embeds", [[[0.0]] * 4] * 2),
        ("past_key_values", [0]),
        ("use_cache", [1]),
        ("sample_weight", [1.0, 2.0]),
    ],
)
def test_columns_of_unknown_meaning_keep_the_batch_padded(name, column):
    assert f"column '{name}'" in pack({**RIGHT, name: column})[METADATA_KEY].reason


@pytest.mark.parametrize("name", ["completion_mask", "token_type_ids", "shift_labels"])
def test_a_known_column_of_another_shape_keeps_the_batch_padded(name):
    assert f"{name} does not have the shape" in pack({**RIGHT, name: [[0] * 3] * 2})[METADATA_KEY].reason


# Positions


def test_left_padding_moves_positions():
    assert pack(LEFT)[METADATA_KEY].moved_positions and not pack(RIGHT)[METADATA_KEY].moved_positions


def test_left_padding_does_not_where_position_ids_skip_it():
    row = pack({**LEFT, "position_ids": [[1, 0, 1, 2], [1, 1, 0, 1]]}, move_positions=False)
    assert not row[METADATA_KEY].moved_positions
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_several_packed_rows_of_which_one_starts_late_move_positions():
    batch = {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]], "position_ids": [[0, 1], [5, 6]]}
    assert pack(batch)[METADATA_KEY].moved_positions
    assert not pack({name: rows[1:] for name, rows in batch.items()})[METADATA_KEY].moved_positions


def test_a_batch_whose_positions_must_not_move_stays_padded():
    kept = pack(LEFT, move_positions=False)
    assert "moves its positions" in kept[METADATA_KEY].reason and kept["input_ids"].tolist() == LEFT["input_ids"]
    assert pack(RIGHT, move_positions=False)[METADATA_KEY].lengths == (3, 2)


@pytest.mark.parametrize("name", ["shift_labels", "token_type_ids", "completion_mask"])
def test_a_column_that_is_none_is_no_column(name):
    row = PaddingFreeCollator(lambda batch: batch)(
        {key: torch.tensor(rows) for key, rows in RIGHT.items()} | {name: None}
    )
    assert row["input_ids"].tolist() == [[11, 12, 13, 21, 22]] and name not in row
