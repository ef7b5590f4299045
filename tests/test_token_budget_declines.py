"""Where ``max_tokens_per_batch`` cannot be exact, batches stay stock's and the report says why; nothing is left."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from hf_helpers import DEFAULTS, Pad, documents, make_trainer, tiny_model
from lightning_helpers import Module, loader
from lightning_helpers import make_trainer as lightning_trainer
from process_helpers import run_in_two_processes
from test_hf_lifecycle import FailAt, assert_nothing_is_left
from token_budget_helpers import BUDGET, EPOCHS, NOT_DISPATCHED, Recorder, Stream, budget_trainer
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from trl_helpers import dpo_trainer, sft_trainer
from trl_helpers import tokens as trl_tokens

from fastft_hf.around_loop import stand_around_loop
from fastft_hf.auto import AutoCallback
from fastft_lightning import FastFTLightningCallback
from fastft_plugins import FastFTCallback, FastFTConfig, FastFTConfigError, FastFTError, apply
from fastft_plugins.run import active_run
from fastft_trl import report_of

CONFIG = {"max_tokens_per_batch": BUDGET}
NO_EFFECT = f"max_tokens_per_batch={BUDGET} has no effect: "


def notes_of(report):
    return [change for change in report.features["packing"].changes if change.startswith("max_tokens_per_batch")]


# Settings


@pytest.mark.parametrize("value", [0, -8, True, 4096.0, "4096"])
def test_a_wrong_value(value):
    with pytest.raises(FastFTConfigError) as raised:
        FastFTConfig(max_tokens_per_batch=value)
    for part in (f"max_tokens_per_batch={value!r}", "None", "an integer above 0", "8192"):
        assert part in str(raised.value)


def test_it_needs_packing():
    with pytest.raises(FastFTConfigError, match=r"max_tokens_per_batch=64 .* packing='off'.*Set packing='auto'"):
        FastFTConfig(packing="off", max_tokens_per_batch=64)


def test_it_travels_like_the_other_fields(tmp_path):
    (tmp_path / "fastft.yaml").write_text("max_tokens_per_batch: 4096\n")
    config = FastFTConfig.from_yaml(tmp_path / "fastft.yaml")
    assert FastFTConfig.from_dict(config.to_dict()) == config == FastFTConfig(max_tokens_per_batch=4096)


# Reasons


class OwnLoader(Trainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


class PlainLoader(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)


class OwnSampler(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return Backwards(self.train_dataset)


class Backwards(SequentialSampler):
    def __iter__(self):
        return iter(range(len(self.data_source)))


class OwnPart(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(range(20))


class OwnBatches(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.WeightedRandomSampler([1.0] * 48, 48)


class Texts:
    def __len__(self):
        return 48

    def __getitem__(self, index):
        return {"text": "w1 w2"}


class FromTexts(Recorder):
    def __call__(self, features):
        return super().__call__(documents(len(features)))


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trainer_class": OwnLoader}, "get_train_dataloader is overridden"),
        ({"trainer_class": PlainLoader}, "get_train_dataloader is overridden"),
        ({"trainer_class": OwnSampler}, "Backwards may draw other documents in each epoch"),
        ({"trainer_class": OwnPart}, "SequentialSampler may draw other documents"),
        ({"trainer_class": OwnBatches}, "WeightedRandomSampler may draw other documents"),
        ({"trainer_class": OwnLoss}, "packing is off in this run"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length has ordered the documents"),
        ({"train_sampling_strategy": "batch_rebalance"}, "forms the batches in a way of its own"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"data": Stream(documents())}, "accelerator_config={'dispatch_batches': False}"),
        ({"data": Texts(), "collator": FromTexts(), "remove_unused_columns": False}, "tokenize before the collator"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_stock_batches_with_the_reason(tmp_path, options, reason):
    seen = []
    for callbacks in ([], [FastFTCallback(CONFIG)]):
        options["collator"] = type(options.get("collator", Recorder()))()
        trainer = make_trainer(tmp_path, tiny_model(), callbacks=callbacks, max_steps=3, **_anew(options))
        trainer.train()
        seen.append(options["collator"].batches)
    assert seen[0] == seen[1]
    (note,) = notes_of(callbacks[0].report)
    assert note.startswith(NO_EFFECT) and reason in note
    assert "budget_share" not in callbacks[0].report.features["packing"].metrics


def _anew(options):
    """With a stream of its own for each training, which remembers its epoch."""
    return {name: Stream(value.rows) if isinstance(value, Stream) else value for name, value in options.items()}


class Sized(Stream):
    def __len__(self):
        return len(self.rows)


def test_the_steps_of_a_stream_have_to_be_given(tmp_path):
    trainer, callback = budget_trainer(tmp_path, tiny_model(), data=Sized(documents()), **EPOCHS, **NOT_DISPATCHED)
    trainer.train()
    assert trainer.state.global_step == 24
    (note,) = notes_of(callback.report)
    assert "set max_steps" in note


def test_rows_of_a_stream_without_tokens_are_an_error_before_the_first_step(tmp_path):
    data = Stream([{"text": "w1 w2"}] * 9)
    trainer, _ = budget_trainer(
        tmp_path,
        tiny_model(),
        data=data,
        collator=FromTexts(),
        max_steps=2,
        remove_unused_columns=False,
        **NOT_DISPATCHED,
    )
    with pytest.raises(FastFTError, match="a row has 'text'; tokenize before the collator"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("asked", [{"packing": "on"}, {"strict": True}], ids=["on", "strict"])
def test_what_was_asked_for_is_an_error_before_the_first_step(tmp_path, asked):
    trainer, _ = budget_trainer(tmp_path, tiny_model(), config=asked | {"moe": "off"}, dataloader_drop_last=True)
    with pytest.raises(FastFTError, match=f"{NO_EFFECT}dataloader_drop_last"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert "get_train_dataloader" not in vars(trainer) and active_run(trainer.model) is None


def test_a_warning_says_so(tmp_path, caplog):
    trainer, _ = budget_trainer(tmp_path, tiny_model(), dataloader_drop_last=True, max_steps=1)
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "max_tokens_per_batch" in record.getMessage()]
    assert len(warnings) == 1 and "leaves batches their number of documents" in warnings[0]


def test_a_callback_that_comes_after_the_trainer_is_made(tmp_path):
    callback = FastFTCallback(CONFIG)
    trainer = make_trainer(tmp_path, tiny_model(), max_steps=2)
    trainer.add_callback(callback)
    trainer.train()
    (note,) = notes_of(callback.report)
    assert "callbacks=[...]" in note and "apply(trainer, config)" in note
    assert callback.report.features["packing"].metrics["packed_batches"] == 2


@pytest.mark.parametrize("asked", [{}, {"packing": "on"}, {"strict": True}], ids=["auto", "on", "strict"])
def test_a_callback_that_joins_a_run_without_a_budget(tmp_path, asked):
    trainer, callback = budget_trainer(tmp_path, tiny_model(), config=asked, max_steps=1)
    with apply(trainer.model) as run:
        if not asked:
            trainer.train()
            assert "a second config" in run.report.notes[0] and callback.report is run.report
            return
        with pytest.raises(FastFTError, match=f"{NO_EFFECT}the run that is active on this model keeps"):
            trainer.train()
    assert trainer.state.global_step == 0 and run.report.state == "finished"


def test_a_callback_that_joins_a_run_with_the_same_budget(tmp_path):
    trainer, _ = budget_trainer(tmp_path, tiny_model(), config={"packing": "on"}, max_steps=1)
    with apply(trainer, CONFIG) as run:
        trainer.train()
    assert run.report.features["packing"].metrics["budget_share"] > 0


# Other trainers


def test_lightning_says_that_it_has_no_effect(tmp_path):
    callback = FastFTLightningCallback(CONFIG)
    lightning_trainer(tmp_path, callbacks=[callback]).fit(Module(), loader())
    (note,) = notes_of(callback.report)
    assert note.startswith(NO_EFFECT) and "only transformers' Trainer" in note
    assert callback.report.features["packing"].metrics["packed_batches"] > 0
    with pytest.raises(FastFTError, match=NO_EFFECT):
        lightning_trainer(tmp_path, callbacks=[FastFTLightningCallback(CONFIG | {"packing": "on"})]).fit(
            Module(), loader()
        )


def test_a_loop_of_ones_own_says_so_too():
    with apply(tiny_model(), CONFIG) as run:
        assert "only transformers' Trainer" in notes_of(run.report)[0]
    with pytest.raises(FastFTError, match=NO_EFFECT), apply(tiny_model(), CONFIG | {"packing": "on"}):
        pass


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding-free"])
def test_trls_flag(tmp_path, options):
    trainer = sft_trainer(tmp_path, trl_tokens(), fastft=True, fastft_config=CONFIG, **EPOCHS, **options)
    trainer.train()
    packing = report_of(trainer).features["packing"]
    assert packing.metrics["documents"] == 96 and packing.metrics["packed_batches"] == 22
    assert trainer.state.global_step == trainer.state.max_steps == 22


def test_trls_flag_is_read_when_training_begins(tmp_path):
    trainer = sft_trainer(tmp_path, trl_tokens(), fastft=True, fastft_config=CONFIG, max_steps=2)
    trainer.args.fastft_config = {"max_tokens_per_batch": 128}
    trainer.train()
    report = report_of(trainer)
    assert "batches hold up to 128 tokens" in str(report.features["packing"].changes) and not report.notes
    trainer.args.fastft = False
    trainer.train()
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, FastFTCallback))
    assert callback.report is report and trainer.state.global_step == 2


def test_scripts_that_know_nothing_of_it(tmp_path, monkeypatch):
    """Under `fastft run --config max_tokens_per_batch=64`."""
    monkeypatch.setenv("FASTFT_CONFIG", '{"max_tokens_per_batch": 64}')
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*DEFAULT_CALLBACKS, AutoCallback])
    trainer = make_trainer(tmp_path, tiny_model(), **EPOCHS)
    trainer.train()
    assert trainer.callback_handler.callbacks[-1].report.features["packing"].metrics["packed_batches"] == 22


def test_trls_losses_over_whole_sequences_keep_their_batches(tmp_path):
    trainer = dpo_trainer(tmp_path, fastft=True, fastft_config=CONFIG, max_steps=1)
    trainer.train()
    assert "packing is off" in notes_of(report_of(trainer))[0]


class TrainsElsewhere(TrainerCallback):
    """Trains the same model with another Trainer after the first step."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            arguments = TrainingArguments(str(self.folder), **(DEFAULTS | {"max_steps": 1}))
            Trainer(model, arguments, Pad(), documents(), callbacks=[FastFTCallback()]).train()


def test_another_trainer_on_the_model_leaves_padded_batches_formed_by_tokens(tmp_path):
    recorder = Recorder()
    trainer, callback = budget_trainer(
        tmp_path, tiny_model(), TrainsElsewhere(tmp_path), collator=recorder, max_steps=4
    )
    trainer.train()
    (note,) = callback.report.notes
    assert "what was left of it in padded batches, formed by up to 64 real tokens" in note
    assert len(set(map(len, recorder.batches))) > 1
    assert callback.report.features["packing"].metrics["packed_batches"] == 1


@pytest.mark.parametrize("asked", [{"packing": "on"}, {"strict": True}], ids=["on", "strict"])
def test_another_trainer_on_the_model_is_an_error_where_packing_was_asked_for(tmp_path, asked):
    config = asked | {"moe": "off", "checkpointing": "off"}
    trainer, callback = budget_trainer(tmp_path, tiny_model(), TrainsElsewhere(tmp_path), config=config)
    with pytest.raises(FastFTError, match="another Trainer begins to train this model in the middle"):
        trainer.train()
    assert trainer.state.global_step == 1 and callback.report.state == "stopped by FastFTError"


# What stays behind


def test_a_finished_run_leaves_nothing_and_can_be_repeated(tmp_path):
    stock = make_trainer(tmp_path, tiny_model(), collator=Recorder(), **EPOCHS)
    trainer, callback = budget_trainer(tmp_path, tiny_model(), collator=Recorder(), **EPOCHS)
    stock.train()
    for _ in range(2):
        trainer.train()
        assert callback.report.state == "finished"
        assert callback.report.features["packing"].metrics["documents"] == 96
        assert len(trainer.get_train_dataloader()) == len(stock.get_train_dataloader()) == 12  # outside training
    assert vars(trainer).pop("_inner_training_loop")  # stays for the next train()
    assert_nothing_is_left(trainer, stock)


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_train_end"])
def test_a_failed_run_leaves_nothing(tmp_path, event):
    fails = FailAt(0, KeyboardInterrupt(), event)
    stock = make_trainer(tmp_path, tiny_model(), callbacks=[fails], max_steps=2)
    trainer, callback = budget_trainer(tmp_path, tiny_model(), fails, max_steps=2)
    for each in (stock, trainer):
        with pytest.raises(KeyboardInterrupt):
            each.train()
    assert vars(trainer).pop("_inner_training_loop")  # stays for the next train()
    assert_nothing_is_left(trainer, stock)
    assert callback.report.state == ("finished" if event == "on_train_end" else "stopped by KeyboardInterrupt")
    assert type(trainer.callback_handler.train_dataloader.collate_fn).__name__ == "RemoveColumnsCollator"


def test_the_trainer_is_stock_once_the_callback_is_removed(tmp_path):
    trainer, callback = budget_trainer(tmp_path, tiny_model(), collator=Recorder(), max_steps=2)
    assert "_inner_training_loop" in vars(trainer)
    trainer.remove_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "_inner_training_loop" not in vars(trainer)
    assert {len(batch) for batch in trainer.data_collator.batches} == {4}


def test_a_callback_that_dies_takes_its_attribute_along(tmp_path):
    trainer, callback = budget_trainer(tmp_path, tiny_model())
    trainer.remove_callback(callback)
    gone = weakref.ref(callback)
    del callback
    gc.collect()
    assert gone() is None and "_inner_training_loop" not in vars(trainer)


def test_a_trainer_dies_as_a_stock_one_does(tmp_path):
    gc.collect()
    gc.disable()
    try:
        for make in (make_trainer, lambda *args, **options: budget_trainer(*args, **options)[0]):
            trainer = make(tmp_path, tiny_model(), max_steps=1)
            gone = weakref.ref(trainer)
            del trainer
            died = gone() is None
            if make is make_trainer:
                stock = died
        assert died == stock
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy], ids=lambda make: make.__name__)
def test_a_copy_of_a_trainer_trains_itself(tmp_path, make):
    trainer, callback = budget_trainer(tmp_path, tiny_model(), max_steps=2)
    copied = make(trainer)
    copied.train()
    assert copied.state.global_step == 2 and trainer.state.global_step == 0
    (own,) = (each for each in copied.callback_handler.callbacks if type(each) is FastFTCallback)
    assert (own is callback) == (copied.model is trainer.model) == (make is copy.copy)
    assert own.report.features["packing"].metrics["budget_share"] > 0
    trainer.train()
    assert trainer.state.global_step == 2 and callback.report.features["packing"].metrics["budget_share"] > 0


def test_a_pickle_holds_the_loop_of_the_trainer_in_it():
    trainer = Trainer.__new__(Trainer)  # one with all its parts cannot be pickled, a stock one neither
    callback = FastFTCallback(CONFIG)
    trainer.callback_handler = types.SimpleNamespace(callbacks=[callback])
    stand_around_loop(trainer, callback)
    loaded = pickle.loads(pickle.dumps(trainer))
    around = vars(loaded)["_inner_training_loop"]
    assert around._trainer() is loaded and around._callback() is loaded.callback_handler.callbacks[0]


def test_without_the_option_the_trainer_is_not_touched(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=[FastFTCallback()])
    assert "_inner_training_loop" not in vars(trainer)


# Several processes

RANKS = """
import sys

import torch
import torch.distributed as dist
from hf_helpers import documents, losses, make_trainer, tiny_model
from token_budget_helpers import (
    BUDGET, EPOCHS, NOT_DISPATCHED, Recorder, Replay, Stream, budget_trainer, epochs_of, indices_of, tokens
)
from torch.testing import assert_close

torch.set_num_threads(1)


class Ranks(Replay):
    \"""Its groups are those of this process already.\"""

    def get_train_dataloader(self):
        return self.unprepared()


folder = sys.argv[1]
for seedable in (True, False):
    options = {"gradient_accumulation_steps": 2, "accelerator_config": {"use_seedable_sampler": seedable}, **EPOCHS}
    recorder = Recorder()
    trainer, _ = budget_trainer(folder, tiny_model(), collator=recorder, **options)
    if not seedable:
        torch.manual_seed(dist.get_rank())  # accelerate gives all processes the sampler's state of the first one
    trainer.train()
    seen = [None, None]
    dist.all_gather_object(seen, indices_of(recorder.batches))
    assert len(seen[0]) == len(seen[1]) == 12
    for epoch in (slice(0, 6), slice(6, 12)):
        assert sorted(document for batches in seen for batch in batches[epoch] for document in batch) == list(range(48))
    assert max(tokens(recorder.batches)) <= BUDGET and seen[0][:6] != seen[0][6:]
    assert trainer.state.global_step == trainer.state.max_steps == 6

    stock = make_trainer(folder, tiny_model(), trainer_class=Ranks, **options)
    stock.groups = epochs_of(seen[dist.get_rank()], 6)
    stock.train()
    assert_close(losses(trainer), losses(stock), rtol=2e-6, atol=2e-6)
    assert_close(trainer.model.state_dict(), stock.model.state_dict(), rtol=0, atol=2e-6)

trainer, callback = budget_trainer(folder, tiny_model(), data=Stream(documents()), max_steps=2, **NOT_DISPATCHED)
trainer.train()
assert "several processes" in str(callback.report.features["packing"].changes)
"""


def test_two_processes_share_the_batches(tmp_path: Path) -> None:
    run_in_two_processes(tmp_path, RANKS)
