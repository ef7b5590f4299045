"""Padded batches become one packed row, packed batches get their metadata, and the rest pass with a reason."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastft_plugins.packing import METADATA_KEY, PackedMetadata, PaddingFreeCollator
from fastft_plugins.packing.metadata import NotPacked

IGNORE = -100
RIGHT = {
    "input_ids": [[11, 12, 13, 0], [21, 0, 0, 0], [31, 32, 33, 34]],
    "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "labels": [[11, 12, 13, IGNORE], [21, IGNORE, IGNORE, IGNORE], [IGNORE, IGNORE, 33, 34]],
}
LEFT = {name: [row[::-1] for row in rows] for name, rows in RIGHT.items()}
MASKED = {**RIGHT, "position_ids": [[0, 1, 2, 1], [0, 1, 1, 1], [0, 1, 2, 3]]}


def tensors(batch):
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def as_it_is(batch):
    return batch


def pack(batch):
    return PaddingFreeCollator(as_it_is)(tensors(batch))


def reason_for(batch):
    """The reason why ``batch`` passes; everything in it must come out as it went in."""
    before = copy.deepcopy(batch)
    result = dict(PaddingFreeCollator(as_it_is)(batch))
    reason = result.pop(METADATA_KEY)
    assert isinstance(reason, NotPacked)
    assert result.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(result[name], value) if isinstance(value, torch.Tensor) else result[name] == value
    return reason.reason


def documents_of(row):
    """(ids, labels) of each document of a packed row."""
    lengths = row[METADATA_KEY].lengths
    columns = (row[name][0].split(lengths) for name in ("input_ids", "labels"))
    return [(ids.tolist(), labels.tolist()) for ids, labels in zip(*columns, strict=True)]


def trained(labels):
    """How many labels Trainer counts, and a causal language model trains."""
    return int((labels[..., 1:] != IGNORE).sum())


# Padded batches


def test_a_right_padded_batch_becomes_one_row():
    assert documents_of(pack(RIGHT)) == [
        ([11, 12, 13], [IGNORE, 12, 13]),
        ([21], [IGNORE]),
        ([31, 32, 33, 34], [IGNORE, IGNORE, 33, 34]),
    ]


def test_a_left_padded_batch_becomes_one_row():
    assert documents_of(pack(LEFT)) == [
        ([13, 12, 11], [IGNORE, 12, 11]),
        ([21], [IGNORE]),
        ([34, 33, 32, 31], [IGNORE, 33, IGNORE, IGNORE]),
    ]


def test_padding_on_both_sides_of_a_row():
    row = pack({"input_ids": [[0, 5, 6, 0]], "attention_mask": [[0, 1, 1, 0]], "labels": [[IGNORE, IGNORE, 6, IGNORE]]})
    assert documents_of(row) == [([5, 6], [IGNORE, 6])]


def test_rows_without_a_mask_are_documents_of_full_length():
    row = pack({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]})
    assert documents_of(row) == [([1, 2], [IGNORE, 2]), ([3, 4], [IGNORE, 4])]


def test_position_ids_of_a_padded_batch_are_understood():
    row, plain = pack(MASKED), pack(RIGHT)
    assert documents_of(row) == documents_of(plain)
    assert torch.equal(row["position_ids"], plain["position_ids"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_the_mask_may_have_any_dtype(dtype):
    batch = tensors(RIGHT)
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    assert documents_of(PaddingFreeCollator(as_it_is)(batch)) == documents_of(pack(RIGHT))


def test_a_packed_row_carries_what_layers_read():
    row = pack(RIGHT)
    metadata = row[METADATA_KEY]
    assert isinstance(metadata, PackedMetadata)
    assert row.keys() == {
        *("input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        *("seq_idx", METADATA_KEY),
    }
    for name in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert row[name].shape == (1, 8), name
    for side in "qk":
        assert row[f"cu_seq_lens_{side}"].tolist() == [0, 3, 4, 8]
        assert row[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert row[f"max_length_{side}"] == 4 and type(row[f"max_length_{side}"]) is int
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert row["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]] and row["seq_idx"].dtype == torch.int32


def test_removed_padding_is_counted():
    metadata = pack(RIGHT)[METADATA_KEY]
    assert (metadata.padded_tokens, metadata.total_tokens) == (12, 8)


# Labels


def test_first_labels_that_left_padding_would_train_are_counted_as_dropped():
    # The first two rows label their first token behind padding; the third has no padding, so stock never trains it.
    assert pack(LEFT)[METADATA_KEY].dropped_labels == 2


def test_right_padding_drops_no_label():
    row = pack(RIGHT)
    assert row[METADATA_KEY].dropped_labels == 0
    assert trained(row["labels"]) == trained(torch.tensor(RIGHT["labels"]))


ROWS_OF_SEVERAL = {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": [[1, 2, 3], [4, 5, 6]]}
ROWS_OF_SEVERAL["position_ids"] = [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("made", [RIGHT, LEFT, ROWS_OF_SEVERAL], ids=["right", "left", "rows of several documents"])
def test_the_batch_of_the_inner_collator_is_not_changed(made):
    batch = tensors(made)
    before = copy.deepcopy(batch)
    row = PaddingFreeCollator(as_it_is)(batch)
    assert row["labels"][0, 0] == IGNORE
    assert batch.keys() == before.keys() and all(torch.equal(batch[name], before[name]) for name in before)


def test_a_batch_that_passes_is_not_changed_either():
    """It may belong to the user's dataset and be met again after the run, by a model that knows no metadata."""
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    PaddingFreeCollator(as_it_is)(batch)
    assert batch.keys() == {"input_ids"}


# Batches that are packed already


@pytest.mark.parametrize(
    "options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True, "return_flash_attn_kwargs": True}]
)
def test_flattened_batches_get_their_metadata(options):
    inner = transformers.DataCollatorWithFlattening(**options)
    features = [{"input_ids": ids} for ids in ([1, 2, 3], [4], [5, 6], [7])]
    flat, row = inner(features), PaddingFreeCollator(inner)(features)
    assert row[METADATA_KEY].lengths == (3, 1, 2, 1)
    for name, value in flat.items():  # what it brought is what stays, bit for bit
        assert torch.equal(row[name], value) if isinstance(value, torch.Tensor) else row[name] == value


def test_a_packed_row_keeps_labels_that_stock_trains_across_documents():
    batch = tensors({"input_ids": [[1, 2, 3, 4]], "labels": [[1, 2, 3, 4]], "position_ids": [[0, 1, 0, 1]]})
    row = PaddingFreeCollator(as_it_is)(batch)
    assert row["labels"].tolist() == [[1, 2, 3, 4]] and row[METADATA_KEY].lengths == (2, 2)


def test_positions_of_a_packed_row_need_not_start_at_zero():
    row = pack({"input_ids": [[1, 2, 3, 4]], "labels": [[1, 2, 3, 4]], "position_ids": [[7, 8, 2, 3]]})
    assert row[METADATA_KEY].lengths == (2, 2) and row["position_ids"].tolist() == [[7, 8, 2, 3]]


def test_tokens_that_fill_a_row_up_become_one_document():
    """As TRL's ``pad_to_multiple_of`` makes them: position 0, no label. One of them alone stays what it is."""
    row = {
        "input_ids": torch.tensor([[7, 8, 9, 5, 0, 0, 0]]),
        "labels": torch.tensor([[-100, 8, 9, -100, -100, -100, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 0, 0, 0]]),
    }
    packed = PaddingFreeCollator(lambda _: row)(None)
    assert packed[METADATA_KEY].lengths == (3, 1, 3)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2]]
    assert torch.equal(packed["input_ids"], row["input_ids"]) and torch.equal(packed["labels"], row["labels"])
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 0, 0]]
    shorter = {name: tensor[:, :5] for name, tensor in row.items()}
    assert PaddingFreeCollator(lambda _: shorter)(None)[METADATA_KEY].lengths == (3, 1, 1)
    row["labels"][0, -1] = 0  # the model is trained to end with it
    assert PaddingFreeCollator(lambda _: row)(None)[METADATA_KEY].lengths == (3, 1, 1, 1, 1)


def test_how_positions_were_made_is_no_change_of_them():
    """On a GPU, tensors are known to be changed by their version, which in-place code of a collator counts up."""
    positions = torch.zeros(1, 4, dtype=torch.long)
    positions[0, 1], positions[0, 3] = 1, 1
    batch = {"input_ids": positions + 5, "labels": positions + 5, "position_ids": positions}
    row = PaddingFreeCollator(as_it_is)(batch)
    assert positions._version > 0 and row["position_ids"]._version == 0
    assert torch.equal(row["position_ids"], positions)


def test_several_packed_rows_become_one():
    row = pack(
        {
            "input_ids": [[1, 2, 3], [4, 5, 6]],
            "labels": [[1, 2, 3], [4, IGNORE, 6]],
            "position_ids": [[0, 1, 0], [3, 4, 5]],  # the second row goes on with the first one's positions
        }
    )
    assert documents_of(row) == [([1, 2], [IGNORE, 2]), ([3], [3]), ([4, 5, 6], [IGNORE, IGNORE, 6])]
    assert row["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]


def test_a_row_that_has_its_metadata_is_left_alone():
    once = pack(RIGHT)
    assert PaddingFreeCollator(as_it_is)(once) is once


# What passes through, with the reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": [[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]}, "holes"),
        ({"labels": [[11, 12, 13, 7], [21] + [IGNORE] * 3, [31, 32, 33, 34]]}, "labels on padding"),
        ({"pixel_values": [[0] * 4] * 3}, "column 'pixel_values'"),
        ({"attention_mask": [[2, 2, 2, 0], [1, 0, 0, 0], [1, 1, 1, 1]]}, "other than 0 and 1"),
        ({"attention_mask": [[0.0, 0.0, 0.0, -1e9]] * 3}, "other than 0 and 1"),
        ({"attention_mask": [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]}, "all padding"),
        ({"attention_mask": [[[[1] * 4] * 4]] * 3}, "attention_mask does not have the shape"),
        ({"labels": [0, 1, 0]}, "labels does not have the shape"),
        ({"position_ids": [0, 1, 2, 3]}, "position_ids does not have the shape"),
        ({"position_ids": [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 1]]}, "position_ids jump"),
    ],
)
def test_batches_that_cannot_be_packed_exactly_pass_with_the_reason(change, reason):
    assert reason in reason_for(tensors({**RIGHT, **change}))


def test_a_batch_whose_only_labels_would_be_dropped_passes():
    """Its loss would be a sum over nothing divided by nothing; stock trains those labels from padding."""
    first_only = [[IGNORE, 13, IGNORE, IGNORE], [IGNORE] * 3 + [21], [IGNORE] * 4]
    assert "its only labels are first labels" in reason_for(tensors({**LEFT, "labels": first_only}))
    one_more = [[IGNORE, 13, IGNORE, IGNORE], [IGNORE] * 3 + [21], [IGNORE] * 3 + [34]]
    assert pack({**LEFT, "labels": one_more})[METADATA_KEY].dropped_labels == 2


def test_columns_on_several_devices_pass():
    batch = tensors(RIGHT)
    batch["labels"] = batch["labels"].to("meta")
    result = PaddingFreeCollator(as_it_is)(batch)
    assert result[METADATA_KEY].reason == "labels is on another device than input_ids"


def test_a_batch_without_labels_passes():
    assert "no labels" in reason_for(tensors({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}))


@pytest.mark.parametrize("ids", [torch.ones(4), torch.ones(2, 0), [[1, 2]]])
def test_a_batch_without_a_table_of_tokens_passes(ids):
    assert "input_ids" in reason_for({"input_ids": ids, "labels": ids})


def test_a_column_that_is_no_tensor_passes():
    assert "'prompt'" in reason_for({**tensors(RIGHT), "prompt": ["a", "b", "c"]})


@pytest.mark.parametrize("result", [None, [1, 2], "text"])
def test_what_is_no_batch_is_returned_untouched(result):
    assert PaddingFreeCollator(as_it_is)(result) is result


# Collators people use


class Tokenizer:
    """A fast tokenizer of words w0 (padding), w1, ..."""

    def __new__(cls, side="right"):
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordLevel

        backend = Backend(WordLevel({f"w{index}": index for index in range(60)}, unk_token="w1"))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side=side)


FEATURES = [
    {"input_ids": [11, 12, 13], "labels": [IGNORE, 12, 13]},
    {"input_ids": [21], "labels": [IGNORE]},
    {"input_ids": [31, 32, 33, 34], "labels": [IGNORE, IGNORE, 33, 34]},
]
ROWS = [(feature["input_ids"], feature["labels"]) for feature in FEATURES]
IDS = [{"input_ids": feature["input_ids"]} for feature in FEATURES]


def test_default_data_collator():
    row = PaddingFreeCollator(transformers.default_data_collator)([FEATURES[0], FEATURES[0]])
    assert documents_of(row) == ROWS[:1] * 2


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("to_multiple", [None, 8])
def test_data_collator_for_seq2seq(side, to_multiple):
    inner = transformers.DataCollatorForSeq2Seq(Tokenizer(side), pad_to_multiple_of=to_multiple)
    assert documents_of(PaddingFreeCollator(inner)(FEATURES)) == ROWS


@pytest.mark.parametrize("side", ["right", "left"])
def test_data_collator_for_language_modeling(side):
    inner = transformers.DataCollatorForLanguageModeling(Tokenizer(side), mlm=False)
    row = PaddingFreeCollator(inner)(IDS)
    assert documents_of(row) == [(ids, [IGNORE, *ids[1:]]) for ids, _ in ROWS]
    assert row[METADATA_KEY].dropped_labels == (2 if side == "left" else 0)


def pad_with_tokenizer(features):
    """A user's own: the result is a BatchEncoding, and labels are made from what was padded."""
    batch = transformers.DataCollatorWithPadding(Tokenizer())(features)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    return batch


def test_a_function_that_returns_a_batch_encoding():
    assert isinstance(pad_with_tokenizer(IDS), transformers.BatchEncoding)
    row = PaddingFreeCollator(pad_with_tokenizer)(IDS)
    assert documents_of(row) == [(ids, [IGNORE, *ids[1:]]) for ids, _ in ROWS]


def test_a_batch_encoding_that_passes_stays_one():
    result = PaddingFreeCollator(transformers.DataCollatorWithPadding(Tokenizer()))(IDS)
    assert isinstance(result, transformers.BatchEncoding)
    assert "no labels" in result[METADATA_KEY].reason


# Processes


def test_it_can_be_pickled():
    collator = PaddingFreeCollator(transformers.DataCollatorForSeq2Seq(Tokenizer()))
    assert documents_of(pickle.loads(pickle.dumps(collator))(FEATURES)) == ROWS


def test_dataloader_workers_pack():
    collator = PaddingFreeCollator(transformers.DataCollatorForSeq2Seq(Tokenizer()))
    loader = DataLoader(FEATURES * 4, batch_size=3, collate_fn=collator, num_workers=2)
    assert [documents_of(row) for row in loader] == [ROWS] * 4


# Random batches against documents worked out token by token


@st.composite
def padded_batches(draw):
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    width = max(lengths) + draw(st.integers(0, 2))
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for length in lengths:
        before = draw(st.sampled_from([0, width - length]))  # all the padding right, or all of it left
        ids = draw(st.lists(st.integers(1, 50), min_size=length, max_size=length))
        labels = draw(st.lists(st.sampled_from([IGNORE, 3, 4]), min_size=length, max_size=length))
        after = width - length - before
        batch["input_ids"].append([0] * before + ids + [0] * after)
        batch["attention_mask"].append([0] * before + [1] * length + [0] * after)
        batch["labels"].append([IGNORE] * before + labels + [IGNORE] * after)
    return batch


@settings(deadline=None, max_examples=150)
@given(padded_batches())
def test_random_padded_batches_match_documents_worked_out_token_by_token(batch):
    expected, dropped = [], 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        document_ids, document_labels = [], []
        for column in range(len(ids)):
            if mask[column]:
                is_first = not document_ids
                dropped += is_first and column > 0 and labels[column] != IGNORE
                document_ids.append(ids[column])
                document_labels.append(IGNORE if is_first else labels[column])
        expected.append((document_ids, document_labels))
    if dropped and all(label == IGNORE for _, labels in expected for label in labels):
        assert "only labels" in reason_for(tensors(batch))
        return
    row = pack(batch)
    assert documents_of(row) == expected
    assert row[METADATA_KEY].dropped_labels == dropped
    assert trained(row["labels"]) == trained(torch.tensor(batch["labels"])) - dropped


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3))
def test_random_packed_rows_are_split_where_positions_restart(rows):
    width = max(map(sum, rows))
    rows = [[*lengths, width - sum(lengths)] if sum(lengths) < width else lengths for lengths in rows]
    positions = [[position for length in lengths for position in range(length)] for lengths in rows]
    ids = torch.arange(len(rows) * width).view(len(rows), width)
    row = pack({"input_ids": ids.tolist(), "labels": ids.tolist(), "position_ids": positions})
    assert list(row[METADATA_KEY].lengths) == [length for lengths in rows for length in lengths]
    assert trained(row["labels"]) == trained(ids)
    assert torch.equal(row["input_ids"].flatten(), ids.flatten())
