"""What the callback leaves behind (nothing), whatever happens in between, and when it declines."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
import transformers
from hf_helpers import Pad, documents, losses, make_trainer, tiny_model
from transformers import AttentionInterface, Trainer, TrainerCallback

from fastft_plugins import FastFTCallback, FastFTError, apply
from fastft_plugins.packing import METADATA_KEY, PaddingFreeCollator
from fastft_plugins.run import active_run


def state_of(trainer):
    """Every attribute of trainer, model, submodules, collator and callback handler, with its type."""
    owners = {"trainer": trainer, "collator": trainer.data_collator, "handler": trainer.callback_handler}
    owners |= {f"model.{name}": module for name, module in trainer.model.named_modules()}
    state = {}
    for owner_name, owner in owners.items():
        for name, value in vars(owner).items():
            state[owner_name, name] = type(value)
            if name in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"):
                state[owner_name, name] = len(value)
            if name == "config":
                state[owner_name, name] = (value._attn_implementation, value.to_dict(), set(vars(value)))
    return state


def shared_configs(model):
    return {id(module.config) for module in model.modules() if hasattr(module, "config")}


class FailAt(TrainerCallback):
    def __init__(self, step, error, event="on_step_end"):
        self.step, self.error = step, error
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise self.error


def assert_nothing_is_left(trainer, stock):
    assert state_of(trainer) == state_of(stock)
    assert len(shared_configs(trainer.model)) == len(shared_configs(stock.model))
    assert "fastft" not in AttentionInterface._global_mapping
    assert active_run(trainer.model) is None


def test_a_finished_run_leaves_nothing(tmp_path):
    stock, ours = (
        make_trainer(tmp_path, tiny_model()),
        make_trainer(tmp_path, tiny_model(), callbacks=[FastFTCallback()]),
    )
    stock.train()
    ours.train()
    assert_nothing_is_left(ours, stock)


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_begin", "on_log", "on_train_end", "on_evaluate"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_a_failed_run_leaves_nothing(tmp_path, event, error):
    options = {"eval_strategy": "steps", "eval_steps": 2, "trainer_options": {"eval_dataset": documents(4)}}
    callback = FastFTCallback()
    stock = make_trainer(tmp_path, tiny_model(), callbacks=[FailAt(0, error, event)], **options)
    ours = make_trainer(tmp_path, tiny_model(), callbacks=[FailAt(0, error, event), callback], **options)
    for trainer in (stock, ours):
        with pytest.raises(type(error)):
            trainer.train()
    assert_nothing_is_left(ours, stock)
    assert callback.report.state == f"stopped by {type(error).__name__}"


class EvaluatesAndGoesOn(TrainerCallback):
    """Evaluates in the middle of training, fails in it, and catches the failure."""

    def evaluate(self, args, state, control, **kwargs):
        with pytest.raises(RuntimeError, match="no room"):
            self.trainer.evaluate()

    on_train_begin = on_epoch_begin = on_step_end = evaluate

    def on_prediction_step(self, args, state, control, **kwargs):
        raise RuntimeError("no room")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_caught_inside_training_does_not_end_the_run(tmp_path, workers):
    ours, evaluates = FastFTCallback(), EvaluatesAndGoesOn()
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": bool(workers), "max_steps": 4}
    evaluates.trainer = make_trainer(
        tmp_path, tiny_model(), callbacks=[ours, evaluates], trainer_options={"eval_dataset": documents(4)}, **options
    )
    evaluates.trainer.train()
    assert ours.report.state == "finished" and len(losses(evaluates.trainer)) == 4
    assert ours.report.features["packing"].metrics["packed_batches"] == 4


class FailsWhereNoEventIsFired(Trainer):
    """In an evaluation before the first epoch, or when the last figures are logged."""

    def evaluate(self, *args, **kwargs):
        raise RuntimeError("no room")

    def log(self, logs, *args, **kwargs):
        if "train_runtime" in logs:
            raise RuntimeError("no tracker")
        super().log(logs, *args, **kwargs)


@pytest.mark.parametrize("options", [{"eval_on_start": True, "eval_strategy": "epoch"}, {}], ids=["first", "last"])
def test_an_error_before_the_first_epoch_or_after_the_last_one_leaves_nothing(tmp_path, options):
    options = {"trainer_class": FailsWhereNoEventIsFired, "trainer_options": {"eval_dataset": documents(4)}, **options}
    callback = FastFTCallback()
    stock = make_trainer(tmp_path, tiny_model(), **options)
    ours = make_trainer(tmp_path, tiny_model(), callbacks=[callback], **options)
    for trainer in (stock, ours):
        with pytest.raises(RuntimeError, match="no room" if "eval_on_start" in options else "no tracker"):
            trainer.train()
    assert_nothing_is_left(ours, stock)
    assert callback.report.state == "stopped by RuntimeError"


def test_an_error_inside_the_model_leaves_nothing(tmp_path):
    stock, ours = (
        make_trainer(tmp_path, tiny_model()),
        make_trainer(tmp_path, tiny_model(), callbacks=[FastFTCallback()]),
    )
    for trainer in (stock, ours):
        for row in trainer.train_dataset[::2]:
            row["input_ids"][0] = 10**6
        with pytest.raises(IndexError):
            trainer.train()
    assert_nothing_is_left(ours, stock)


def test_train_twice_and_a_callback_added_later(tmp_path):
    stock, ours, callback = make_trainer(tmp_path, tiny_model()), make_trainer(tmp_path, tiny_model()), FastFTCallback()
    ours.add_callback(callback)
    for _ in range(2):
        for trainer in (stock, ours):
            trainer.train()
        assert callback.report.features["packing"].metrics["packed_batches"] == 5
        torch.testing.assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=0, atol=2e-6)
    stock.add_callback(TrainerCallback())
    assert_nothing_is_left(ours, stock)


def test_a_retry_after_out_of_memory_starts_afresh(tmp_path, monkeypatch):
    """auto_find_batch_size enters the training loop again without any callback event for the failure."""
    callback, failures = FastFTCallback(), []

    class RunsOutOnce(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not failures:
                failures.append(state.global_step)
                raise RuntimeError("CUDA out of memory.")

    ours = make_trainer(tmp_path, tiny_model(), callbacks=[callback, RunsOutOnce()], auto_find_batch_size=True)
    stock = make_trainer(tmp_path, tiny_model(), callbacks=[TrainerCallback()])
    ours.train()
    stock.train()
    assert failures and callback.report.features["packing"].metrics["packed_batches"] == 5
    assert len(losses(ours)) == 5
    assert state_of(ours).keys() == state_of(stock).keys()
    assert "fastft" not in AttentionInterface._global_mapping


def test_apply_around_a_trainer(tmp_path):
    stock, ours = make_trainer(tmp_path, tiny_model()), make_trainer(tmp_path, tiny_model())
    stock.train()
    with apply(ours) as run:
        ours.train()
    assert run.report.features["packing"].metrics["packed_batches"] == 5
    torch.testing.assert_close(losses(ours), losses(stock), rtol=2e-6, atol=2e-6)
    assert_nothing_is_left(ours, stock)


def test_apply_and_callback_together_patch_once(tmp_path):
    callback = FastFTCallback()
    ours = make_trainer(tmp_path, tiny_model(), callbacks=[callback])
    with apply(ours) as run:
        ours.train()
        assert run.active, "the callback must not end the block's run"
    assert callback.report is run.report
    assert run.report.features["packing"].metrics["packed_batches"] == 5
    assert METADATA_KEY not in Pad()(documents(2))
    assert active_run(ours.model) is None


def test_apply_restores_a_model_after_an_interrupt():
    model, fresh = tiny_model(), tiny_model()
    with pytest.raises(KeyboardInterrupt), apply(model) as run:
        model(**PaddingFreeCollator(Pad())(documents(3)))
        raise KeyboardInterrupt
    assert run.report.state == "stopped by KeyboardInterrupt"
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {
        name: vars(m).keys() for name, m in fresh.named_modules()
    }


def test_apply_on_a_model_leaves_unpacked_batches_bitwise_stock():
    model, batch = tiny_model("mistral").train(), Pad("left", 1)(documents(4))
    stock = model(**batch)
    with apply(model) as run:
        inside = model(**batch)
    assert torch.equal(stock.logits, inside.logits) and torch.equal(stock.loss, inside.loss)
    assert run.report.features["packing"].metrics == {"unpacked_batches": 1}


def test_two_models_at_once_and_the_first_ends_first():
    first, second = tiny_model(), tiny_model("qwen3")
    batch = PaddingFreeCollator(Pad())(documents(3))
    outer = apply(first)
    outer.__enter__()
    with apply(second):
        outer.__exit__(None, None, None)
        second(**batch).loss.backward()
    assert "fastft" not in AttentionInterface._global_mapping


def test_a_dead_run_keeps_nothing_alive_and_leaves_nothing():
    model = tiny_model()
    apply(model).__enter__()  # never exited
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert "fastft" not in AttentionInterface._global_mapping


class PerSequenceMean(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        trained = labels[:, 1:] != -100
        loss = ((token_losses * trained).sum(1) / trained.sum(1)).mean()
        return (loss, None) if return_outputs else loss


def own_loss_function(outputs, labels, num_items_in_batch=None):
    rows = [
        torch.nn.functional.cross_entropy(row[:-1], label[1:])
        for row, label in zip(outputs.logits, labels, strict=True)
    ]
    return torch.stack(rows).mean()


@pytest.mark.parametrize("kind", ["overridden compute_loss", "compute_loss_func", "replaced on the instance"])
def test_a_loss_of_ones_own_declines_and_stays_stock(tmp_path, kind, caplog):
    options = {"overridden compute_loss": {"trainer_class": PerSequenceMean}}.get(
        kind, {"trainer_options": {"compute_loss_func": own_loss_function}} if kind == "compute_loss_func" else {}
    )
    callback = FastFTCallback()
    stock = make_trainer(tmp_path, tiny_model(), **options)
    ours = make_trainer(tmp_path, tiny_model(), callbacks=[callback], **options)
    if kind == "replaced on the instance":
        for trainer in (stock, ours):
            trainer.compute_loss = lambda model, inputs, trainer=trainer, **kwargs: PerSequenceMean.compute_loss(
                trainer, model, inputs
            )
    with caplog.at_level(logging.WARNING, logger="fastft"):
        for trainer in (stock, ours):
            trainer.train()
    assert losses(ours) == losses(stock)
    packing = callback.report.features["packing"]
    assert not packing.enabled and "loss" in packing.reason
    assert len([record for record in caplog.records if record.name == "fastft"]) == 1


@pytest.mark.parametrize("config", [{"packing": "on"}, {"strict": True}])
def test_what_cannot_be_on_raises_before_the_first_step(tmp_path, config):
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=[FastFTCallback(config)], trainer_class=PerSequenceMean)
    before = {name: parameter.clone() for name, parameter in trainer.model.state_dict().items()}
    with pytest.raises(FastFTError, match="compute_loss"):
        trainer.train()
    assert trainer.state.global_step == 0
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    assert "fastft" not in AttentionInterface._global_mapping


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "attention_dropout", 0.1), "attention_dropout"),
        (lambda model: setattr(model.config, "_attn_implementation_internal", "paged|sdpa"), "'paged|sdpa' is kept"),
        (lambda model: setattr(model, "loss_function", own_loss_function), "loss function of its own"),
        (lambda model: model.config.rope_parameters.update(rope_type="dynamic"), "dynamic"),
        (
            lambda model: (model.set_attn_implementation("eager"), setattr(model.config, "output_attentions", True)),
            "output_attentions",
        ),
    ],
)
def test_models_that_packing_cannot_serve_decline_with_the_reason(change, reason):
    model = tiny_model()
    change(model)
    with apply(model) as run:
        pass
    assert reason in run.report.features["packing"].reason and not run.report.features["packing"].enabled


def test_other_families_decline_with_the_reason():
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=50)
    with apply(transformers.BloomForCausalLM(config)) as run:
        pass
    assert "BloomForCausalLM: its attention does not go through" in run.report.features["packing"].reason


def test_a_model_class_of_ones_own_declines():
    class MyLlama(transformers.LlamaForCausalLM):
        pass

    with apply(MyLlama(tiny_model().config)) as run:
        pass
    assert "not transformers' own class" in run.report.features["packing"].reason


def test_batches_that_cannot_be_packed_stay_padded_and_are_counted(tmp_path):
    class PadWithHoles(Pad):
        def __call__(self, features):
            batch = super().__call__(features)
            if len(features[0]["input_ids"]) % 2:  # some of the batches
                batch["attention_mask"][0, 1] = 0
                batch["labels"][0, 1] = -100
            return batch

    data = documents(shortest=4)
    callback = FastFTCallback()
    stock = make_trainer(tmp_path, tiny_model(), collator=PadWithHoles(), data=data, max_steps=8)
    ours = make_trainer(tmp_path, tiny_model(), collator=PadWithHoles(), data=data, max_steps=8, callbacks=[callback])
    for trainer in (stock, ours):
        trainer.train()
    packing = callback.report.features["packing"]
    assert packing.metrics["unpacked_batches"] > 0 and packing.metrics["packed_batches"] > 0
    assert packing.metrics["unpacked_batches"] + packing.metrics["packed_batches"] == 8
    assert any("holes" in change for change in packing.changes)
    torch.testing.assert_close(losses(ours), losses(stock), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mutate", ["position_ids", "no position_ids", "attention_mask", "shape"])
def test_a_batch_changed_after_the_collator_never_meets_stale_metadata(mutate):
    """Trained as one sequence its documents would mix, and the padded batch is gone: an error is all that is left."""
    model = tiny_model().train()
    batch = PaddingFreeCollator(Pad())(documents(count=4, shortest=6, longest=6))
    if mutate == "position_ids":
        batch["position_ids"].copy_(torch.arange(24)[None])  # one document now
    elif mutate == "no position_ids":
        del batch["position_ids"]
    elif mutate == "attention_mask":
        batch["attention_mask"] = torch.ones(1, 24, dtype=torch.long)
    else:
        batch = {
            key: value[:, :20] if key in ("input_ids", "labels", "position_ids") else value
            for key, value in batch.items()
        }
    with apply(model), pytest.raises(FastFTError, match=r"after the collator.*packing='off'"):
        model(**batch)


def test_persistent_workers_of_a_loader_that_is_used_twice(tmp_path):
    """A trainer that keeps one loader with live workers: they must take the new collator, and the old one after."""

    class KeepsItsLoader(Trainer):
        def get_train_dataloader(self):
            if not hasattr(self, "kept"):
                self.kept = super().get_train_dataloader()
            return self.kept

    callback = FastFTCallback()
    trainer = make_trainer(
        tmp_path, tiny_model(), trainer_class=KeepsItsLoader, dataloader_num_workers=1,
        dataloader_persistent_workers=True, max_steps=14,
    )  # fmt: skip
    trainer.train()
    trainer.add_callback(callback)
    trainer.train()
    assert callback.report.features["packing"].metrics["packed_batches"] == 14
    assert METADATA_KEY not in next(iter(trainer.kept))


def test_random_state_is_that_of_the_stock_run(tmp_path):
    draws = []
    for callbacks in ([], [FastFTCallback()]):
        make_trainer(tmp_path, tiny_model(), callbacks=callbacks).train()
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_a_copy_made_during_a_run_is_stock(tmp_path):
    """A pickle and a deep copy of the model, used after the run has ended."""
    model = tiny_model()
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with apply(model):
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(copy.deepcopy(model.model.layers)))]
        assert torch.equal(copies[0](ids).logits, expected)
    assert all(type(layer.self_attn.config) is type(model.config) for layer in copies[1])
