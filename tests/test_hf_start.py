"""How the callback's run begins: beside callbacks that fail, after runs that were left behind, inside blocks."""

from __future__ import annotations

import pytest
from hf_helpers import DEFAULTS, Pad, documents, losses, make_trainer, tiny_model
from torch.testing import assert_close
from transformers import AttentionInterface, Trainer, TrainerCallback, TrainingArguments

from fastft_hf import trainer as hf_trainer
from fastft_plugins import FastFTCallback, FastFTError, apply
from fastft_plugins.run import active_run


class Bad(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise RuntimeError("no tracker")


def trainer_of(model, folder, callbacks):
    """A Trainer of the model itself, not of a copy."""
    made = make_trainer(folder, tiny_model())
    return Trainer(model, made.args, data_collator=Pad(), train_dataset=made.train_dataset, callbacks=callbacks)


def packed(report):
    return report.features["packing"].metrics.get("packed_batches")


def test_a_callback_that_fails_after_ours_leaves_no_run(tmp_path):
    model, ours, bad = tiny_model(), FastFTCallback(), Bad()
    trainer = trainer_of(model, tmp_path, [ours, bad])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no tracker"):
            trainer.train()
        assert ours.report.state == "stopped by RuntimeError" and active_run(model) is None
        assert "get_train_dataloader" not in vars(trainer) and "on_train_begin" not in vars(bad)
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert "fastft" not in AttentionInterface._global_mapping
    callback = FastFTCallback()
    trainer_of(model, tmp_path, [callback]).train()
    assert packed(callback.report) == 5


@pytest.mark.parametrize("start", ["trainer", "apply to trainer", "apply to model"])
def test_a_run_that_was_left_behind_is_not_joined(tmp_path, monkeypatch, start):
    model, old = tiny_model().train(), FastFTCallback()
    with monkeypatch.context() as patch:  # without its Trainer a callback cannot know that training has failed
        patch.setattr(hf_trainer, "find_trainer", lambda callback: None)
        failing = trainer_of(model, tmp_path, [old, Bad()])
        with pytest.raises(RuntimeError, match="no tracker"):
            failing.train()
    assert active_run(model) is not None
    if start == "trainer":
        callback = FastFTCallback()
        trainer_of(model, tmp_path, [callback]).train()
        report = callback.report
    else:
        trainer = trainer_of(model, tmp_path, [])
        with apply(trainer if start == "apply to trainer" else model) as run:
            if start == "apply to trainer":
                trainer.train()
            else:
                model(**run.collator(Pad())(documents(4))).loss.backward()
        report = run.report
    assert old.report.state == report.state == "finished" and report is not old.report
    assert packed(report) == (1 if start == "apply to model" else 5)
    assert active_run(model) is None


def test_another_trainer_inside_a_block_starts_afresh(tmp_path):
    model, callback = tiny_model(), FastFTCallback()
    first, second = trainer_of(model, tmp_path, []), trainer_of(model, tmp_path, [callback])
    with apply(first) as run:
        second.train()
        assert not run.active
    assert packed(callback.report) == 5 and active_run(model) is None


def test_a_block_around_a_model_is_joined_by_the_callback(tmp_path):
    model, callback = tiny_model(), FastFTCallback()
    with apply(model) as run:
        trainer_of(model, tmp_path, [callback]).train()
        assert run.active and callback.report is run.report
    assert "no batch was packed" in run.report.features["packing"].reason


def test_two_callbacks_share_one_run(tmp_path, caplog):
    callbacks = [FastFTCallback(), FastFTCallback()]
    trainer_of(tiny_model(), tmp_path, callbacks).train()
    assert callbacks[0].report is callbacks[1].report and packed(callbacks[0].report) == 5
    assert callbacks[0].report.notes == [] and not any("is not used" in message for message in caplog.messages)


def test_a_config_that_is_not_used_is_named(tmp_path, caplog):
    """The second callback's, or that of a callback inside a block."""
    first, second = FastFTCallback({"moe": "off"}), FastFTCallback({"packing": "off"})
    trainer = trainer_of(tiny_model(), tmp_path, [first, second])
    trainer.train()
    trainer.remove_callback(first)
    with apply(trainer, {"moe": "off"}) as run, apply(trainer, {"moe": "off"}):
        trainer.train()
    for report in (first.report, run.report):
        (note,) = report.notes
        assert "packing='off'" in note.split("is not used")[0] and packed(report) == 5
    assert len([message for message in caplog.messages if "is not used" in message]) == 2


class TrainsInside(TrainerCallback):
    """Trains a second model in the middle of training the first."""

    def __init__(self, inner):
        self.inner = inner

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.inner.train()


def test_a_callback_in_two_trainers_at_once_is_refused_and_in_turn_works(tmp_path):
    shared = FastFTCallback()
    inner = trainer_of(tiny_model(), tmp_path, [shared])
    outer = trainer_of(tiny_model(), tmp_path, [shared, TrainsInside(inner)])
    with pytest.raises(FastFTError, match=r"still at work in another Trainer.*a FastFTCallback of its own"):
        outer.train()
    for model in (inner.model, outer.model):
        assert active_run(model) is None
    inner.train()
    assert packed(shared.report) == 5
    outer.remove_callback(TrainsInside)
    outer.train()
    assert packed(shared.report) == 5
    own = FastFTCallback()
    trainer_of(tiny_model(), tmp_path, [own, TrainsInside(inner)]).train()
    assert packed(own.report) == packed(shared.report) == 5


def test_a_run_left_behind_ends_when_its_callback_starts_anew(tmp_path, monkeypatch):
    """On another model, where nothing else would end it."""
    first, callback = tiny_model(), FastFTCallback()
    with monkeypatch.context() as patch:
        patch.setattr(hf_trainer, "find_trainer", lambda callback: None)
        with pytest.raises(RuntimeError, match="no tracker"):
            trainer_of(first, tmp_path, [callback, Bad()]).train()
    left = callback.report
    trainer_of(tiny_model(), tmp_path, [callback]).train()
    assert left.state == "finished" and active_run(first) is None
    assert not any(module._forward_pre_hooks for module in first.modules())


class Delegates(TrainerCallback):
    """A user's callback that passes events on to ours, which is then in no list of the Trainer's."""

    def __init__(self, ours):
        self.ours = ours

    def on_train_begin(self, *args, **kwargs):
        self.ours.on_train_begin(*args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        self.ours.on_train_end(*args, **kwargs)


def test_a_callback_that_cannot_find_its_trainer_declines(tmp_path):
    """Without the Trainer its loss is unknown."""
    ours, model = FastFTCallback(), tiny_model()
    stock, delegating = (make_trainer(tmp_path, model, callbacks=each) for each in ([], [Delegates(ours)]))
    stock.train(), delegating.train()
    assert "cannot be found, so its loss is unknown" in ours.report.features["packing"].reason
    assert losses(delegating) == losses(stock) and active_run(delegating.model) is None


def test_the_report_says_what_was_wrapped_once_it_is(tmp_path):
    """Inside the block, before training, there is no dataloader yet."""
    trainer = trainer_of(tiny_model(), tmp_path, [])
    assert isinstance(trainer.args, TrainingArguments)
    with apply(trainer) as run:
        assert "when training makes it" in run.report.features["packing"].changes[0]
        trainer.train()
    assert run.report.features["packing"].changes[0].endswith("; collator of the train dataloader")


def test_a_block_around_a_trainer_that_makes_its_model_anew_declines(tmp_path):
    """``model_init`` replaces the model inside train(): what a block changed before would be the old one."""

    def trainer():
        arguments = TrainingArguments(str(tmp_path), **DEFAULTS)
        return Trainer(args=arguments, model_init=lambda: tiny_model(), data_collator=Pad(), train_dataset=documents())

    stock, inside, callback = trainer(), trainer(), FastFTCallback()
    with apply(inside) as run:
        inside.train()
    assert "model_init" in run.report.features["packing"].reason
    with_callback = trainer()
    with_callback.add_callback(callback)
    for each in (stock, with_callback):
        each.train()
    assert losses(inside) == losses(stock)
    assert callback.report.features["packing"].metrics["packed_batches"] == 5
    assert_close(losses(with_callback), losses(stock), rtol=2e-6, atol=2e-6)
