"""What a run in Lightning leaves behind: nothing, however it ended. And how it is switched on."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import hf_helpers
import lightning
import pytest
import torch
import transformers
from hf_helpers import Pad, documents, tiny_model
from lightning_helpers import ROOT, Module, OwnLoss, declare_entry_points, loader, make_trainer
from transformers import AttentionInterface

import fastft_plugins
from fastft_lightning import FastFTLightningCallback
from fastft_lightning.batches import TwinCollator
from fastft_plugins import FastFTCallback, FastFTConfigError, FastFTError, FastFTPlugin, apply
from fastft_plugins.packing import METADATA_KEY, PaddingFreeCollator
from fastft_plugins.run import active_run


@pytest.fixture
def entry_points(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("site")
    declare_entry_points(folder)
    monkeypatch.syspath_prepend(folder)


def state_of(trainer, module, train_loader):
    """Every attribute of trainer, strategy, loader, module and submodules, with its type."""
    owners = {"trainer": trainer, "strategy": trainer.strategy, "loader": train_loader}
    owners |= {f"module.{name}": part for name, part in module.named_modules()}
    state = {"callbacks": [type(callback) for callback in trainer.callbacks]}
    for owner_name, owner in owners.items():
        for name, value in vars(owner).items():
            state[owner_name, name] = type(value)
            if "_hooks" in name and isinstance(value, dict):
                state[owner_name, name] = len(value)
    return state


class Fail(lightning.Callback):
    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.fail)

    def fail(self, *args, **kwargs):
        if self.error == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise self.error


class FailsAgain(lightning.Callback):
    def on_exception(self, trainer, pl_module, exception):
        raise ValueError("again")


class Inert(lightning.Callback):
    """Where the other trainer has the callback."""


def fit_both(tmp_path, make_callbacks, expected=None):
    """Fit a stock trainer and one with the callback last in the list; returns the callback."""
    states = []
    for callback in (Inert(), FastFTLightningCallback()):
        module, train_loader = Module(), loader()
        trainer = make_trainer(tmp_path, callbacks=[*make_callbacks(), callback])
        if expected is None:
            trainer.fit(module, train_loader)
        else:
            with pytest.raises(expected):
                trainer.fit(module, train_loader)
        states.append(state_of(trainer, module, train_loader))
        assert type(train_loader.collate_fn) is Pad
        assert "fastft" not in AttentionInterface._global_mapping
        assert active_run(module) is None
    states[1]["callbacks"][states[1]["callbacks"].index(FastFTLightningCallback)] = Inert
    assert states[1] == states[0]
    return callback


def test_a_finished_run_leaves_nothing(tmp_path):
    report = fit_both(tmp_path, lambda: [Inert()]).report
    assert report.state == "finished" and report.features["packing"].metrics["packed_batches"] == 6


EVENTS = ["on_fit_start", "on_train_start", "on_train_batch_start", "on_before_zero_grad", "on_train_end", "teardown"]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError("boom"), RuntimeError), (KeyboardInterrupt(), SystemExit)],
    ids=["exception", "interrupt"],
)
def test_a_failed_run_leaves_nothing(tmp_path, event, error, expected):
    before = signal.getsignal(signal.SIGINT)
    try:
        callback = fit_both(tmp_path, lambda: [Fail(event, error)], expected)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores further interrupts while it shuts down
    state = "finished" if event == "teardown" else f"stopped by {type(error).__name__}"
    assert callback.report.state in (state, "not started")


def test_sigterm_leaves_nothing(tmp_path):
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    callback = fit_both(tmp_path, lambda: [Fail("on_train_batch_end", signal.SIGTERM)], SIGTERMException)
    assert callback.report.state == "stopped by SIGTERMException"


def test_another_callback_that_fails_on_the_exception_changes_nothing(tmp_path):
    fit_both(tmp_path, lambda: [Fail("on_train_batch_end", RuntimeError("boom")), FailsAgain()], ValueError)


def test_an_error_inside_the_model_leaves_nothing(tmp_path):
    class Breaks(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.model.norm.weight = None

    fit_both(tmp_path, lambda: [Breaks()], TypeError)


def test_fit_twice_on_one_trainer_and_one_loader(tmp_path):
    callback, train_loader = FastFTLightningCallback(), loader(num_workers=1, persistent_workers=True)
    for _ in range(2):
        make_trainer(tmp_path, callbacks=[callback]).fit(Module(), train_loader)
        assert callback.report.features["packing"].metrics["packed_batches"] == 6
    assert METADATA_KEY not in next(iter(train_loader))


def test_plugin_callback_and_block_together_start_one_run(tmp_path, entry_points):
    plugin, callback = FastFTPlugin(), FastFTLightningCallback()
    trainer = make_trainer(tmp_path, plugins=[plugin], callbacks=[callback])
    assert trainer.callbacks == [callback, plugin.callback]
    with apply(trainer) as run:
        trainer.fit(Module(), loader())
    assert run.report is callback.report is plugin.report
    assert run.report.features["packing"].metrics["packed_batches"] == 6


def test_a_block_restores_after_an_interrupt(tmp_path):
    module, train_loader = Module(), loader()
    trainer = make_trainer(tmp_path, callbacks=[Fail("on_train_batch_end", RuntimeError("boom"))])
    with pytest.raises(RuntimeError), apply(trainer) as run:
        trainer.fit(module, train_loader)
    assert run.report.state == "stopped by RuntimeError"
    assert len(trainer.callbacks) == 1 and type(train_loader.collate_fn) is Pad and active_run(module) is None


def test_other_trainers_stay_as_they_are(tmp_path, entry_points):
    FastFTPlugin()
    assert make_trainer(tmp_path).callbacks == []


def test_without_the_entry_point_the_plugin_says_what_to_do(monkeypatch):
    import fastft_lightning.marker as marker

    monkeypatch.setattr(marker, "entry_points", lambda group: [])
    with pytest.raises(FastFTError, match=r"callbacks=\[FastFTLightningCallback"):
        FastFTPlugin()


def test_without_lightning_the_import_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastft-plugins\[lightning\]'"):
        fastft_plugins.FastFTPlugin  # noqa: B018


def test_the_switch_of_transformers_says_which_one_is_lightnings(tmp_path):
    with pytest.raises(FastFTError, match=r"plugins=\[FastFTPlugin\(\)\]"):
        make_trainer(tmp_path, callbacks=[FastFTCallback()]).fit(Module(), loader())


def test_the_switch_of_lightning_says_which_one_is_transformers(tmp_path, entry_points):
    with pytest.raises(FastFTError, match=r"callbacks=\[FastFTCallback\(\)\]"):
        hf_helpers.make_trainer(tmp_path, tiny_model(), callbacks=[FastFTPlugin()])


@pytest.mark.parametrize("config", [{"pakking": "on"}, {"packing": "yes"}])
def test_a_bad_config_raises_at_once(config):
    with pytest.raises(FastFTConfigError):
        FastFTLightningCallback(config)


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()


class MovesItself(Module):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


class LossInTheModel(Module):
    """A loss per sequence put into the model's own forward, where it looks like the model's own loss."""

    def __init__(self):
        super().__init__()
        forward = self.model.forward

        def with_another_loss(labels=None, **kwargs):
            output = forward(labels=labels, **kwargs)
            output["loss"] = OwnLoss.mean_per_sequence(output.logits, labels)
            return output

        self.model.forward = with_another_loss


class NoModel(Module):
    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("make_module", "reason"),
    [
        (Manual, "manual optimization"),
        (MovesItself, "on_after_batch_transfer"),
        (LossInTheModel, "the forward of LlamaForCausalLM is replaced by code of test_lightning_lifecycle"),
    ],
)
def test_modules_that_packing_cannot_serve_train_stock(tmp_path, make_module, reason, caplog):
    stock, ours, callback = make_module(), make_module(), FastFTLightningCallback()
    with caplog.at_level(logging.WARNING, logger="fastft"):
        for module, callbacks in ((stock, []), (ours, [callback])):
            options = {} if make_module is not Manual else {"gradient_clip_val": None}
            make_trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader())
    assert ours.losses == stock.losses
    packing = callback.report.features["packing"]
    assert not packing.enabled and reason in packing.reason
    assert len([record for record in caplog.records if record.name == "fastft"]) == 1


@pytest.mark.parametrize("config", [{"packing": "on"}, {"strict": True}])
def test_what_cannot_be_on_raises_before_the_first_step(tmp_path, config):
    module = Manual()
    with pytest.raises(FastFTError, match="manual"):
        make_trainer(tmp_path, callbacks=[FastFTLightningCallback(config)], gradient_clip_val=None).fit(
            module, loader()
        )
    assert module.losses == [] and "fastft" not in AttentionInterface._global_mapping


def test_a_module_without_a_language_model_declines(tmp_path):
    callback = FastFTLightningCallback()
    with pytest.raises(TypeError):  # its step fails with or without us
        make_trainer(tmp_path, callbacks=[callback]).fit(NoModel(), loader())
    assert "causal language model" in callback.report.features["packing"].reason


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_batch_changed_by_a_hook_never_meets_a_stale_row(tmp_path, when):
    class Changes(Module):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if when == "before":
                batch = {**batch, "input_ids": batch["input_ids"].roll(1, 1)}
            return batch

        def loss(self, batch):
            if when == "after":
                batch["input_ids"].add_(1).remainder_(90)
            return super().loss(batch)

    stock, ours, callback = Changes(), Changes(), FastFTLightningCallback()
    make_trainer(tmp_path).fit(stock, loader())
    make_trainer(tmp_path, callbacks=[callback]).fit(ours, loader())
    packing = callback.report.features["packing"]
    if when == "before":
        assert packing.metrics["packed_batches"] == 6, "from what the hook made of the batch"
        torch.testing.assert_close(ours.losses, stock.losses, rtol=2e-6, atol=2e-6)
    else:
        assert not packing.enabled and "packed_batches" not in packing.metrics
        assert "does not pass the batch's input_ids on as it came" in packing.reason
        assert ours.losses == stock.losses


def test_checkpointing_in_eval_mode_is_noticed(tmp_path, caplog):
    model = tiny_model().eval()
    model.gradient_checkpointing_enable()
    callback = FastFTLightningCallback()
    with caplog.at_level(logging.WARNING, logger="fastft"):
        make_trainer(tmp_path, callbacks=[callback]).fit(Module(model), loader())
    assert any("model.train()" in note for note in callback.report.notes)
    assert "eval mode" in caplog.text
    assert callback.report.features["packing"].metrics["packed_batches"] == 6, "packing is exact in eval mode too"


def test_documents_that_stock_would_mix_are_kept_apart_and_reported(tmp_path):
    runs = []
    for use_cache, callbacks in ((True, []), (False, []), (True, [FastFTLightningCallback()])):
        model = tiny_model()
        model.config.use_cache = use_cache
        module = Module(model)
        trainer = make_trainer(tmp_path, callbacks=callbacks)
        trainer.fit(module, loader(transformers.DataCollatorWithFlattening()))
        runs.append(module.losses)
    leaking, right, ours = runs
    assert abs(leaking[0] - right[0]) > 1e-4, "stock has stopped mixing them: remove the note"
    torch.testing.assert_close(ours, right, rtol=2e-6, atol=2e-6)
    assert any("use_cache" in note for note in callbacks[0].report.notes)


class Copies(lightning.Callback):
    """Copies and pickles the whole module in the middle of training, as callbacks that keep the best weights do."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 3:
            self.weights = copy.deepcopy(module.model.state_dict())
            self.copy, self.model_pickle = copy.deepcopy(module), pickle.dumps(module.model)


def test_a_copy_or_pickle_made_during_training_is_stock(tmp_path):
    copies, ours, batch = Copies(), FastFTLightningCallback({"packing": "on"}), Pad()(documents(4))
    make_trainer(tmp_path, callbacks=[ours, copies]).fit(Module(), loader())
    stock = tiny_model()
    stock.load_state_dict(copies.weights)
    assert b"fastft" not in copies.model_pickle
    for model in (copies.copy.model, pickle.loads(copies.model_pickle)):
        assert torch.equal(model(**batch).loss, stock(**batch).loss)


def test_a_copy_of_a_model_in_fabric_is_stock():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, batch = fabric.setup(tiny_model().train()), Pad()(documents(4))
    with apply(model, {"packing": "on"}):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model.module))]
        assert b"fastft" not in pickle.dumps(model.module)
    assert all(torch.equal(other(**batch).loss, model(**batch).loss) for other in copies)


def test_a_twin_survives_pickling_and_the_batch_stays_what_it_was():
    collator = pickle.loads(pickle.dumps(TwinCollator(Pad(), PaddingFreeCollator)))
    batch, plain = collator(documents(3)), Pad()(documents(3))
    twin = pickle.loads(pickle.dumps(batch)).pop(METADATA_KEY)
    del batch[METADATA_KEY]
    assert batch.keys() == plain.keys() and all(torch.equal(batch[key], plain[key]) for key in plain)
    assert twin.matches(plain)
    index_T, ids = twin.index_T, plain["input_ids"]
    assert torch.equal(ids.flatten()[index_T], twin.row["input_ids"][0])


def test_command_line_of_lightning(tmp_path):
    pytest.importorskip("jsonargparse")
    declare_entry_points(tmp_path)
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
        from lightning.pytorch.cli import LightningCLI
        from lightning_helpers import Module, loader
        cli = LightningCLI(Module, run=False, save_config_callback=None)
        cli.trainer.fit(cli.model, loader())
        (plugin,) = [callback for callback in cli.trainer.callbacks if type(callback).__name__.startswith("FastFT")]
        assert plugin.report.features["packing"].metrics["packed_batches"] == 6
        print(plugin.config)
        """)
    )
    (tmp_path / "config.yaml").write_text(
        textwrap.dedent("""
        trainer:
          max_epochs: 1
          accelerator: cpu
          logger: false
          enable_checkpointing: false
          plugins:
            - class_path: fastft_lightning.FastFTPlugin
              init_args:
                config: {packing: "on"}
        """)
    )
    path = [str(tmp_path), str(ROOT), str(ROOT / "integrations"), str(ROOT / "tests"), *sys.path]
    done = subprocess.run(
        [sys.executable, "program.py", "--config", "config.yaml"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "packing='on'" in done.stdout
