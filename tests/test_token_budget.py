"""``max_tokens_per_batch`` in transformers' Trainer: every document once, stock's numbers for the same groups."""

from __future__ import annotations

import math
from itertools import chain

import datasets
import pytest
import torch
from hf_helpers import DEFAULTS, Gradients, Pad, documents, grad_norms, losses, make_trainer, tiny_model
from token_budget_helpers import (
    BUDGET,
    EPOCHS,
    NOT_DISPATCHED,
    Recorder,
    Replay,
    StopAt,
    Stream,
    budget_trainer,
    epochs_of,
    indices_of,
    tokens,
)
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from fastft_plugins import FastFTCallback, apply
from fastft_plugins.packing import best_fit


def train(folder, *more, collator=None, **options):
    """Returns the trainer, its callback and the batches that the collator saw."""
    recorder = collator or Recorder()
    trainer, callback = budget_trainer(folder, tiny_model(), *more, collator=recorder, **options)
    trainer.train()
    return trainer, callback, recorder.batches


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("padding", [("right", 3), ("left", 1)], ids=["right", "left"])
def test_the_numbers_are_stocks_for_the_same_groups(tmp_path, accumulation, padding):
    ours, theirs = Gradients(), Gradients()
    options = {**EPOCHS, "gradient_accumulation_steps": accumulation, "learning_rate": 0.02}
    trainer, callback, batches = train(tmp_path, ours, collator=Recorder(*padding), **options)
    per_epoch = len(batches) // 2
    stock = make_trainer(
        tmp_path, tiny_model(), collator=Pad(*padding), callbacks=[theirs], trainer_class=Replay, **options
    )
    stock.groups = [indices_of(epoch) for epoch in epochs_of(batches, per_epoch)]
    stock.train()
    assert trainer.state.global_step == stock.state.global_step == 2 * math.ceil(per_epoch / accumulation)
    assert_close(losses(trainer), losses(stock), rtol=2e-6, atol=2e-6)
    assert_close(grad_norms(trainer), grad_norms(stock), rtol=2e-5, atol=1e-6)
    assert_close(ours.steps, theirs.steps, rtol=2e-5, atol=2e-6)
    assert_close(trainer.model.state_dict(), stock.model.state_dict(), rtol=0, atol=2e-6)
    assert callback.report.features["packing"].metrics["packed_batches"] == len(batches)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_document_is_used_once_in_each_epoch(tmp_path, accumulation):
    trainer, callback, batches = train(tmp_path, **EPOCHS, gradient_accumulation_steps=accumulation)
    epochs = epochs_of(indices_of(batches), len(batches) // 2)
    assert [sorted(chain(*epoch)) for epoch in epochs] == [list(range(48))] * 2
    assert epochs[0] != epochs[1]
    assert max(tokens(batches)) <= BUDGET
    assert trainer.state.max_steps == trainer.state.global_step == 2 * math.ceil(len(epochs[0]) / accumulation)
    assert trainer.state.epoch == 2 and max(trainer.lr_scheduler.get_last_lr()) == 0
    packing = callback.report.features["packing"]
    assert f"batches hold up to 64 tokens in place of 4 documents: {len(epochs[0])} an epoch" in packing.changes
    used = sum(tokens(batches))
    assert packing.metrics["documents"] == 96 and packing.metrics["tokens"] == used
    assert packing.metrics["budget_share"] == pytest.approx(used / (BUDGET * len(batches)))
    assert packing.metrics["longer_documents"] == 0


def test_documents_come_in_the_order_of_the_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr(best_fit, "BUFFER", 8)
    options = {"train_sampling_strategy": "sequential", "max_steps": -1, "num_train_epochs": 1}
    _, _, batches = train(tmp_path, **options)
    rows = documents()
    order = best_fit.best_fit(range(48), lambda index: len(rows[index]["input_ids"]), BUDGET, 8)
    assert indices_of(batches) == list(order)


def test_epochs_that_fill_fewer_or_more_batches_still_have_the_planned_number(tmp_path, monkeypatch):
    monkeypatch.setattr(best_fit, "BUFFER", 2)
    trainer, _, batches = train(tmp_path, max_steps=-1, num_train_epochs=8, logging_steps=100)
    assert trainer.state.global_step == trainer.state.max_steps == len(batches)
    for epoch in epochs_of(indices_of(batches), len(batches) // 8):
        assert sorted(chain(*epoch)) == list(range(48))


def test_max_steps_goes_on_for_as_many_epochs_as_it_takes(tmp_path):
    trainer, _, batches = train(tmp_path, max_steps=30, per_device_train_batch_size=1)  # stock: one epoch has 48
    assert trainer.state.global_step == len(losses(trainer)) == 30 and len(batches) >= 30
    assert trainer.state.epoch == pytest.approx(30 / 11)


def test_the_seed_decides(tmp_path):
    one, again, other = (train(tmp_path, max_steps=3, seed=seed)[2] for seed in (1, 1, 2))
    assert one == again != other


def test_workers_change_nothing(tmp_path):
    alone, _, _ = train(tmp_path, max_steps=8)
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3}
    trainer, callback, _ = train(tmp_path, max_steps=8, **options)
    assert losses(trainer) == losses(alone)
    assert callback.report.features["packing"].metrics["packed_batches"] == 8


def test_a_longer_document_has_a_batch_of_its_own(tmp_path):
    rows = [*documents(20), {"input_ids": [5 + index % 7 for index in range(150)]}]
    _, callback, batches = train(tmp_path, data=rows, max_steps=-1, num_train_epochs=1)
    assert [len(batch) for batch in batches if sum(map(len, batch)) > BUDGET] == [1]
    assert sorted(chain(*indices_of(batches, rows))) == list(range(21))
    assert callback.report.features["packing"].metrics["longer_documents"] == 1


def hf_dataset(rows, **columns):
    return datasets.Dataset.from_list([{**row, **{name: make(row) for name, make in columns.items()}} for row in rows])


def some_masks(row):
    return [1] * len(row["input_ids"]) if row["input_ids"][0] > 50 else None


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": torch.tensor(self.rows[index]["input_ids"])}


class OfTensors(Recorder):
    def __call__(self, features):
        return super().__call__([{"input_ids": feature["input_ids"].tolist()} for feature in features])


@pytest.mark.parametrize(
    ("data", "collator"),
    [
        (hf_dataset(documents()), Recorder),
        (hf_dataset(documents()[::-1]).select(range(47, -1, -1)), Recorder),
        (hf_dataset(documents(), attention_mask=lambda row: [1] * len(row["input_ids"])), Recorder),
        (hf_dataset(documents()).with_format("torch"), OfTensors),
        (hf_dataset(documents()).with_transform(lambda rows: rows), Recorder),
        (Rows(documents()), OfTensors),
        (hf_dataset(documents(), attention_mask=lambda row: None), Recorder),
        (hf_dataset(documents(), attention_mask=some_masks), Recorder),
        (
            hf_dataset(documents(), attention_mask=lambda row: [1]).with_format("torch", columns=["input_ids"]),
            OfTensors,
        ),
    ],
    ids=["table", "indices", "mask", "tensors", "transform", "torch", "no mask", "some masks", "columns of a format"],
)
def test_every_kind_of_dataset_is_batched_alike(tmp_path, data, collator):
    seen = [
        train(tmp_path, data=rows, collator=make(), max_steps=8)[2]
        for rows, make in ((documents(), Recorder), (data, collator))
    ]
    assert seen[0] == seen[1]


def test_padding_in_the_rows_does_not_count(tmp_path):
    """Tokenized with padding="max_length": 32 ids each, of which the mask names the real ones."""
    rows = [
        {
            "input_ids": (ids := row["input_ids"]) + [0] * (32 - len(ids)),
            "attention_mask": [1] * len(ids) + [0] * (32 - len(ids)),
        }
        for row in documents()
    ]

    def stack(features):
        batch = {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}
        groups.append(batch["attention_mask"].sum().item())
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    groups = []
    trainer, callback = budget_trainer(
        tmp_path, tiny_model(), data=datasets.Dataset.from_list(rows), collator=stack, **EPOCHS
    )
    trainer.train()
    metrics = callback.report.features["packing"].metrics
    assert max(groups) <= BUDGET and metrics["budget_share"] > 0.9 and metrics["packed_batches"] == len(groups)


# Going on after an interruption


@pytest.mark.parametrize(
    ("data", "step"),
    [(documents(), 4), (documents(), 17), (Stream(documents()), 4)],  # of a stream, the Trainer knows no second epoch
    ids=["first epoch", "second epoch", "stream"],
)
def test_a_resumed_run_trains_on_the_rest(tmp_path, data, step):
    options = {"data": data, "max_steps": 20, "save_strategy": "steps", "save_steps": step, **NOT_DISPATCHED}
    whole, _, _ = train(tmp_path / "whole", **options)
    train(tmp_path / "cut", StopAt(step), **options)
    recorder = Recorder()
    resumed, callback = budget_trainer(tmp_path / "cut", tiny_model(), collator=recorder, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 20
    assert losses(resumed) == losses(whole)
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert callback.report.features["packing"].metrics["packed_batches"] == 20 - step


# Streams


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_is_filled_as_it_comes(tmp_path, accumulation):
    options = {"max_steps": 5, "gradient_accumulation_steps": accumulation, **NOT_DISPATCHED}
    trainer, callback, batches = train(tmp_path, data=Stream(documents()), **options)
    groups = indices_of(batches)[: 5 * accumulation]
    rows = documents()
    expected = list(best_fit.best_fit(range(48), lambda index: len(rows[index]["input_ids"]), BUDGET, best_fit.BUFFER))
    assert groups == expected[: 5 * accumulation]
    stock = make_trainer(tmp_path, tiny_model(), collator=Pad(), trainer_class=Replay, **options)
    stock.groups = [groups]
    stock.train()
    assert_close(losses(trainer), losses(stock), rtol=2e-6, atol=2e-6)
    assert_close(trainer.model.state_dict(), stock.model.state_dict(), rtol=0, atol=2e-6)
    assert "as many as the stream fills" in str(callback.report.features["packing"].changes)


def test_a_stream_begins_anew_with_the_next_epoch(tmp_path):
    _, _, batches = train(tmp_path, data=Stream(documents()), max_steps=22, **NOT_DISPATCHED)
    first, second = indices_of(batches)[:11], indices_of(batches)[11:22]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(48)) and first != second


def test_each_worker_fills_batches_from_its_share_of_a_stream(tmp_path):
    rows = documents()
    lengths_of = [[len(row["input_ids"]) for row in rows[worker::2]] for worker in range(2)]
    shares = [best_fit.best_fit(lengths, int, BUDGET, best_fit.BUFFER) for lengths in lengths_of]
    count = sum(len(list(share)) for share in shares)
    options = {"dataloader_num_workers": 2, "max_steps": count, **NOT_DISPATCHED}
    _, callback, _ = train(tmp_path, data=Stream(rows), **options)
    metrics = callback.report.features["packing"].metrics
    assert metrics["documents"] == 48 and metrics["packed_batches"] == count


def test_a_stream_of_datasets(tmp_path):
    data = hf_dataset(documents()).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=10)
    _, callback, batches = train(tmp_path, data=data, max_steps=25, **NOT_DISPATCHED)
    assert max(tokens(batches)) <= BUDGET and callback.report.features["packing"].metrics["packed_batches"] == 25
    assert sorted(chain(*indices_of(batches)[:11])) == list(range(48))


# Other switches, and what is left alone


def test_inside_apply(tmp_path):
    _, _, batches = train(tmp_path, **EPOCHS)
    recorder = Recorder()
    trainer = make_trainer(tmp_path, tiny_model(), collator=recorder, **EPOCHS)
    with apply(trainer, {"max_tokens_per_batch": BUDGET}) as run:
        trainer.train()
    assert recorder.batches == batches
    assert run.report.features["packing"].metrics["packed_batches"] == len(batches)


def test_with_a_model_that_the_trainer_makes_and_checkpoints(tmp_path):
    plain, _, batches = train(tmp_path, data_seed=3, **EPOCHS)
    callback = FastFTCallback({"max_tokens_per_batch": BUDGET})
    # The order comes from data_seed: making the model sets torch's own.
    arguments = TrainingArguments(str(tmp_path), **(DEFAULTS | EPOCHS), gradient_checkpointing=True, data_seed=3)
    trainer = Trainer(
        args=arguments,
        model_init=lambda: tiny_model(),
        data_collator=Pad(),
        train_dataset=documents(),
        callbacks=[callback],
    )
    for _ in range(2):  # each time with another model
        trainer.train()
        assert callback.report.features["packing"].metrics["packed_batches"] == len(batches)
        assert_close(losses(trainer), losses(plain), rtol=2e-6, atol=2e-6)


def test_evaluation_keeps_its_batches(tmp_path):
    seen = []
    for budget in (False, True):
        recorder = Recorder()
        options = {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "trainer_options": {"eval_dataset": documents(13, seed=9)},
        }
        make = budget_trainer if budget else lambda *args, **given: (make_trainer(*args, **given), None)
        trainer, _ = make(
            tmp_path, tiny_model(), collator=recorder, max_steps=2, per_device_eval_batch_size=5, **options
        )
        trainer.train()
        seen.append(
            [batch for batch in recorder.batches if batch[0] in [row["input_ids"] for row in documents(13, seed=9)]]
        )
    assert seen[0] == seen[1] and list(map(len, seen[0])) == [5, 5, 3]
