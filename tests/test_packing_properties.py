"""Random layouts of documents give stock's numbers, and mistakes planted into packing are noticed by the comparison."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from fastft_hf import decoder_hook
from fastft_hf import model as hf_model
from fastft_plugins import FastFTError, apply
from fastft_plugins.packing import METADATA_KEY, PackedMetadata, PaddingFreeCollator, collator, packed_attention

IGNORE = -100
CONFIG = {"packing": "on", "moe": "off"}
MODEL = tiny_model("mistral").train()  # windows of 5 tokens


def padded_batch(lengths, sides, trained, seed=0):
    """Rows of random tokens. ``trained`` says which labels count; a first label behind padding never does."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
    column = torch.arange(width)
    real = torch.stack([column >= width - n if left else column < n for n, left in zip(lengths, sides, strict=True)])
    labels = ids.masked_fill(~real, IGNORE)
    labels = labels.masked_fill(torch.rand(ids.shape, generator=generator) > trained, IGNORE)
    labels[torch.arange(len(lengths)), real.int().argmax(1)] = IGNORE
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long(), "labels": labels}


def loss_and_gradients(batch):
    MODEL.zero_grad()
    # A sum with the denominator of the Trainer: a batch without labels has a loss of 0, not of NaN.
    trained = int((batch["labels"][..., 1:] != IGNORE).sum())
    loss = MODEL(**batch, num_items_in_batch=max(trained, 1)).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in MODEL.named_parameters()}


def assert_packed_is_stocks(batch):
    stock = loss_and_gradients(batch)
    with apply(MODEL, CONFIG) as run:
        ours = loss_and_gradients(PaddingFreeCollator(lambda batch: batch)(batch))
    assert run.report.features["packing"].metrics["packed_batches"] == 1
    assert_close(ours, stock, rtol=1e-4, atol=5e-6)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_padded_batches(data):
    lengths = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=7))
    sides = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    assert_packed_is_stocks(padded_batch(lengths, sides, data.draw(st.sampled_from([0.0, 0.3, 1.0]))))


@pytest.mark.parametrize(
    ("lengths", "trained"),
    [([1], 1.0), ([1, 1, 1], 1.0), ([1, 9, 1], 1.0), ([6, 3], 0.0), ([3] * 1000, 1.0), ([1] * 1000, 1.0)],
    ids=["one token", "only one-token documents", "between", "all labels masked", "1,000 documents", "1,000 tokens"],
)
def test_layouts_at_the_edge(lengths, trained):
    assert_packed_is_stocks(padded_batch(lengths, [False] * len(lengths), trained))


def test_a_batch_without_tokens_is_handed_on_with_a_reason():
    empty = {name: torch.zeros(2, 0, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    assert "input_ids" in PaddingFreeCollator(lambda batch: batch)(empty)[METADATA_KEY].reason
    with pytest.raises(ValueError, match="at least one document"):
        PackedMetadata.from_lengths([])


def test_an_empty_row_keeps_the_batch_padded():
    batch = padded_batch([3, 2], [False, False], 1.0)
    batch["attention_mask"][1] = 0
    batch["labels"][1] = IGNORE
    assert "all padding" in PaddingFreeCollator(lambda batch: batch)(batch)[METADATA_KEY].reason


# Long and many documents, straight through attention


def attend(lengths, **options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 1, 4, generator=generator).requires_grad_() for _ in range(3))
    out = packed_attention(q, k, v, PackedMetadata.from_lengths(lengths), **options)
    out.square().sum().backward()
    return (q, k, v), out, (q.grad, k.grad, v.grad)


def assert_rows_are_softmax(inputs, out, rows, window=None):
    """The rows of one document, each worked out from all the keys that it sees."""
    q, k, v = (tensor.detach()[:, 0] for tensor in inputs)
    for row in rows:
        first = 0 if window is None else max(0, row - window + 1)
        weights = (k[first : row + 1] @ q[row] / 2).softmax(0)
        assert_close(out[row, 0], weights @ v[first : row + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [64, 1000])
def test_one_document_of_32k_tokens(window):
    inputs, out, gradients = attend([32_768], window=window)
    assert_rows_are_softmax(inputs, out, [0, 1, window - 1, window, 20_000, 32_767], window)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_one_document_of_32k_tokens_without_a_window():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(32_768, 1, 4, generator=generator) for _ in range(3)]
    out = packed_attention(*inputs, PackedMetadata.from_lengths([32_768]))
    assert_rows_are_softmax(inputs, out, [0, 1, 16_000, 32_767])


@pytest.mark.parametrize("window", [None, 3])
def test_a_thousand_documents(window):
    lengths = [1 + index * 7 % 13 for index in range(1000)]
    inputs, out, gradients = attend(lengths, window=window)
    start = 0
    for length in lengths[:40]:
        document = [tensor[start : start + length].detach().requires_grad_() for tensor in inputs]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        seen = (distance >= 0) & (distance < (window or length))
        alone = scaled_dot_product_attention(*(tensor.transpose(0, 1) for tensor in document), attn_mask=seen)
        alone.square().sum().backward()
        assert_close(out[start : start + length], alone.transpose(0, 1), rtol=1e-4, atol=1e-5)
        for ours, tensor in zip(gradients, document, strict=True):
            assert_close(ours[start : start + length], tensor.grad, rtol=1e-4, atol=1e-5)
        start += length


# Mistakes


def merge_a_boundary(monkeypatch):
    lengths_of = PackedMetadata.from_lengths

    def merged(lengths, **options):
        return lengths_of([lengths[0] + lengths[1], *lengths[2:]], **options)

    monkeypatch.setattr(PackedMetadata, "from_lengths", merged)


def move_a_boundary(monkeypatch):
    lengths_of = PackedMetadata.from_lengths

    def moved(lengths, **options):
        return lengths_of([lengths[0] - 1, lengths[1] + 1, *lengths[2:]], **options)

    monkeypatch.setattr(PackedMetadata, "from_lengths", moved)


def shift_the_window(monkeypatch):
    def shifted(*tensors, window, **options):
        return packed_attention(*tensors, window=window and window + 1, **options)

    monkeypatch.setattr(hf_model, "packed_attention", shifted)


def forget_the_window(monkeypatch):
    def forgetful(*tensors, window, **options):
        return packed_attention(*tensors, window=None, **options)

    monkeypatch.setattr(hf_model, "packed_attention", forgetful)


def keep_first_labels(monkeypatch):
    pack = collator._pack

    def kept(batch):
        row = pack(batch)
        starts = row["cu_seq_lens_q"][1:-1].long()
        row["labels"][:, starts] = row["input_ids"][:, starts]
        return row

    monkeypatch.setattr(collator, "_pack", kept)


def continue_positions(monkeypatch):
    """The boundaries are right, but the rotary angles of each document start where the last one's ended."""
    row_of = collator._row

    def continued(ids_T, labels_T, position_ids_T, *rest):
        return row_of(ids_T, labels_T, torch.arange(len(ids_T)).pow(2) // 2, *rest)

    monkeypatch.setattr(collator, "_row", continued)
    monkeypatch.setattr(decoder_hook, "_why_stale", lambda *batch: None)


def leak_through_the_scale(monkeypatch):
    def scaled(*tensors, scale, **options):
        return packed_attention(*tensors, scale=scale * 1.01, **options)

    monkeypatch.setattr(hf_model, "packed_attention", scaled)


MISTAKES = [
    merge_a_boundary,
    move_a_boundary,
    shift_the_window,
    forget_the_window,
    keep_first_labels,
    continue_positions,
    leak_through_the_scale,
]


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda plant: plant.__name__.replace("_", " "))
def test_a_planted_mistake_is_noticed(plant, monkeypatch):
    batch = padded_batch([9, 7, 12], [False, True, False], 1.0)
    assert_packed_is_stocks(batch)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_packed_is_stocks(batch)


def test_positions_that_go_on_are_one_document_and_refused():
    """Positions alone, as a wrong collator would make them: they no longer agree with the metadata."""
    batch = PaddingFreeCollator(lambda batch: batch)(padded_batch([4, 5], [False, False], 1.0))
    batch["position_ids"] = torch.arange(9)[None]
    for config in ({"moe": "off"}, CONFIG):
        with pytest.raises(FastFTError, match="position_ids were changed"), apply(MODEL, config):
            MODEL(**batch)


def test_metadata_of_other_documents_is_refused():
    batch = PaddingFreeCollator(lambda batch: batch)(padded_batch([4, 5], [False, False], 1.0))
    batch[METADATA_KEY] = PackedMetadata.from_lengths([5, 4])
    with pytest.raises(FastFTError, match="position_ids were changed"), apply(MODEL, {"moe": "off"}):
        MODEL(**batch)
