"""Batches of every kind that people feed a Trainer: packed where it is exact, and otherwise what stock does."""

from __future__ import annotations

import pytest
import torch
from family_models import tiny_family
from hf_helpers import Pad, documents, grad_norms, losses, make_trainer, tiny_model
from torch.testing import assert_close
from torch.utils.data import IterableDataset, WeightedRandomSampler
from transformers import Trainer

from fastft_plugins import FastFTCallback, apply
from fastft_plugins.packing import METADATA_KEY, PaddingFreeCollator


def compare(folder, model, collator, **options):
    """Three steps of stock training and with the callback; returns the packing entry of the report."""
    callback = FastFTCallback()
    options = {"max_steps": 3, "learning_rate": 0.02, **options}
    stock = make_trainer(folder, model, collator=collator, **options)
    stock.train()  # before the next one sets the seed: some samplers draw from torch's own generator
    ours = make_trainer(folder, model, collator=collator, callbacks=[callback], **options)
    ours.train()
    assert_close(losses(ours), losses(stock), rtol=2e-6, atol=2e-6)
    assert_close(grad_norms(ours), grad_norms(stock), rtol=2e-5, atol=1e-6)
    assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=0, atol=2e-6)
    return callback.report.features["packing"]


class With(Pad):
    """Padded batches with one more column, made from the ids and the mask."""

    def __init__(self, name, make, side="right"):
        super().__init__(side, mask_prompt=1)
        self.name, self.make = name, make

    def __call__(self, features):
        batch = super().__call__(features)
        return {**batch, self.name: self.make(batch)}


def shifted(batch):
    return torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()


@pytest.mark.parametrize(
    "collator",
    [
        With("token_type_ids", lambda batch: torch.zeros_like(batch["input_ids"])),
        With("completion_mask", lambda batch: batch["attention_mask"] * (batch["input_ids"] % 2)),
        With("shift_labels", shifted),
        Pad("right", mask_prompt=3),
    ],
    ids=["token_type_ids", "completion_mask", "shift_labels", "labels of completions only"],
)
def test_columns_with_a_known_meaning_are_packed(tmp_path, collator):
    packing = compare(tmp_path, tiny_model(), collator, remove_unused_columns=False)
    assert packing.metrics["packed_batches"] == 3


@pytest.mark.parametrize(
    ("collator", "reason"),
    [
        (With("token_type_ids", lambda batch: batch["attention_mask"]), "token_type_ids other than 0"),
        (With("pixel_values", lambda batch: torch.zeros(len(batch["input_ids"]), 3)), "column 'pixel_values'"),
        (With("attention_mask", lambda batch: batch["attention_mask"] * (batch["input_ids"] != 7)), "holes"),
    ],
    ids=["several segments", "image", "holes"],
)
def test_batches_of_another_meaning_stay_padded_and_are_counted(tmp_path, collator, reason):
    data = [{"input_ids": [5, 6, 7, 8] * (1 + index % 3)} for index in range(24)]
    packing = compare(tmp_path, tiny_model(), collator, data=data)
    assert packing.metrics["unpacked_batches"] == 3 and "packed_batches" not in packing.metrics
    assert any(reason in change for change in packing.changes)


def test_left_padded_batches_of_a_model_with_absolute_positions_stay_padded(tmp_path):
    model = tiny_family("gpt_bigcode")
    packing = compare(tmp_path, model, Pad("left", mask_prompt=1))
    assert packing.metrics["unpacked_batches"] == 3
    assert any("moves its positions" in change for change in packing.changes)
    assert compare(tmp_path, model, Pad("right")).metrics["packed_batches"] == 3


class FirstLabels(Pad):
    """Left-padded batches in which some rows train their first token only, and others nothing."""

    def __call__(self, features):
        batch = super().__call__(features)
        first = batch["attention_mask"].cumsum(1) * batch["attention_mask"] == 1
        return {**batch, "labels": batch["input_ids"].where(first, torch.tensor(-100))}


def test_a_batch_that_trains_first_labels_behind_padding_only_stays_padded(tmp_path):
    packing = compare(tmp_path, tiny_model(), FirstLabels("left"))
    assert packing.metrics["unpacked_batches"] == 3 and "first labels" in packing.reason


# Which documents meet in which batch


class Recorder(Pad):
    """Remembers the documents of each batch in order."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def __call__(self, features):
        self.batches.append([feature["input_ids"] for feature in features])
        return super().__call__(features)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Weighted(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        weights = [len(row["input_ids"]) for row in self.train_dataset]
        return WeightedRandomSampler(weights, len(weights), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "options",
    [
        {"data": Stream(documents()), "accelerator_config": {"dispatch_batches": False}},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "sequential"},
        {"trainer_class": Weighted},
        {"max_steps": -1, "num_train_epochs": 2, "data": documents(10)},
        {"per_device_train_batch_size": 1},
    ],
    ids=["stream", "grouped by length", "sequential", "weighted", "two epochs", "one document a batch"],
)
def test_the_same_documents_meet_in_the_same_batches(tmp_path, options):
    seen = []
    for callbacks in ([], [FastFTCallback({"packing": "on"})]):
        recorder = Recorder()
        make_trainer(tmp_path, tiny_model(), collator=recorder, callbacks=callbacks, **options).train()
        seen.append(recorder.batches)
    assert seen[0] == seen[1] and len(seen[0]) >= 4


def test_a_stream_and_grouped_batches_train_as_stock(tmp_path):
    stream = {"data": Stream(documents()), "accelerator_config": {"dispatch_batches": False}}
    assert compare(tmp_path, tiny_model(), Pad(), **stream).metrics["packed_batches"] == 3
    grouped = compare(tmp_path, tiny_model(), Pad(), train_sampling_strategy="group_by_length")
    assert grouped.metrics["packed_batches"] == 3


def test_a_stream_that_one_process_reads_for_all_declines(tmp_path):
    """The default for streams: the batch of one process is cut into slices of rows, and a packed batch has one row."""
    packing = compare(tmp_path, tiny_model(), Pad(), data=Stream(documents()))
    assert not packing.enabled and "accelerator_config={'dispatch_batches': False}" in packing.reason


def test_data_parallel_declines():
    with apply(torch.nn.DataParallel(tiny_model())) as run:
        pass
    assert "DataParallel" in run.report.features["packing"].reason


def test_context_parallelism_declines(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model())
    trainer.accelerator.state.parallelism_config = object()
    try:
        with apply(trainer) as run:
            pass
    finally:
        trainer.accelerator.state.parallelism_config = None
    assert "context, sequence and tensor parallelism" in run.report.features["packing"].reason


# Caches


def test_a_cache_never_meets_a_packed_row():
    """With a cache, transformers forgets the documents of a packed row and attends across them."""
    model = tiny_model("mistral").train()
    batch = PaddingFreeCollator(Pad())(documents(4))
    with apply(model, {"packing": "on"}):
        without, asked = model(**batch, use_cache=False), model(**batch, use_cache=True)
    assert torch.equal(asked.logits, without.logits) and asked.past_key_values is None


def test_a_batch_with_a_past_is_stocks():
    model = tiny_model().eval()
    past = lambda: model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values  # noqa: E731
    batch = PaddingFreeCollator(Pad())(documents(1))
    standard = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        stock = model(**standard, past_key_values=past()).logits
        with apply(model, {"packing": "on"}):
            assert torch.equal(model(**batch, past_key_values=past()).logits, stock)
    assert METADATA_KEY in batch
