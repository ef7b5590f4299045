"""Training in Lightning with the plugin is stock training: losses, logged metrics and weights, on the CPU."""

from __future__ import annotations

import json
import logging

import lightning
import pytest
import pytorch_lightning
import torch
import transformers
from hf_helpers import FAMILIES, Pad, documents, tiny_model
from lightning.pytorch.callbacks import LearningRateFinder
from lightning_helpers import (
    Accuracy,
    DictOutput,
    LabelsOfItsOwn,
    Module,
    NamedArguments,
    OwnLoss,
    OwnLossBesideTheModels,
    Steps,
    TuningItsRate,
    declare_entry_points,
    loader,
    make_trainer,
)
from torch.testing import assert_close

from fastft_lightning import FastFTLightningCallback
from fastft_plugins import FastFTError, FastFTPlugin, apply
from fastft_plugins.packing import PaddingFreeCollator

EXACT = {"rtol": 2e-6, "atol": 2e-6}


@pytest.fixture(autouse=True)
def entry_points(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("site")
    declare_entry_points(folder)
    monkeypatch.syspath_prepend(folder)


def compare(
    tmp_path,
    make_module=Module,
    make_loader=loader,
    *,
    namespace=lightning,
    tolerance=None,
    losses_of_a_batch=1,
    **options,
):
    """Fit twice and hold the run with the plugin to the stock one. Returns its report."""
    tolerance = tolerance or EXACT
    plugin = FastFTPlugin({"packing": "on"})
    stock, ours = make_module(), make_module()
    stock_trainer = make_trainer(tmp_path, namespace, **options)
    trainer = make_trainer(tmp_path, namespace, plugins=[plugin], **options)
    stock_trainer.fit(stock, make_loader())
    trainer.fit(ours, make_loader())
    assert len(stock.losses) >= 5
    assert_close(ours.losses, stock.losses, **tolerance)
    assert_close(trainer.callback_metrics, stock_trainer.callback_metrics, **tolerance)
    assert_close(ours.state_dict(), stock.state_dict(), **tolerance)
    assert plugin.report.features["packing"].metrics["packed_batches"] == len(ours.losses) / losses_of_a_batch
    return plugin.report


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_families_and_padding_sides(tmp_path, family, side):
    compare(tmp_path, lambda: Module(tiny_model(family)), lambda: loader(Pad(side, 1)))


@pytest.mark.parametrize("make_module", [NamedArguments, DictOutput, Accuracy])
def test_however_training_step_calls_the_model(tmp_path, make_module):
    """The last batch is smaller: a wrong batch size would change the mean that is logged for the epoch."""
    report = compare(tmp_path, make_module)
    assert report.features["packing"].metrics["padding_removed"] > 0


class OtherNamespace(Steps, pytorch_lightning.LightningModule):
    pass


def test_the_other_namespace(tmp_path):
    compare(tmp_path, OtherNamespace, namespace=pytorch_lightning)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("bf16-mixed", {"rtol": 2e-3, "atol": 2e-3}),
        ("bf16-true", {"rtol": 2e-2, "atol": 2e-2}),
        ("64-true", EXACT),  # transformers computes the loss in fp32
    ],
)
def test_the_precision_stays_the_users(tmp_path, precision, tolerance):
    compare(tmp_path, precision=precision, tolerance=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"max_epochs": 2},
        {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
        {"max_steps": 5, "max_epochs": -1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_the_trainer(tmp_path, options):
    compare(tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}],
    ids=lambda options: "-".join(options),
)
def test_dataloader_workers(tmp_path, options):
    compare(tmp_path, make_loader=lambda: loader(**options), max_epochs=2)


class PadWithMore(Pad):
    """Columns for the module itself, which it does not pass on."""

    def __call__(self, features):
        return super().__call__(features) | {"index": torch.arange(len(features)), "source": ["somewhere"] * 4}


def test_columns_that_the_model_does_not_get(tmp_path):
    compare(tmp_path, NamedArguments, lambda: loader(PadWithMore("right", 1)))


class InOrder(Pad):
    def __call__(self, features):
        return tuple(super().__call__(features).values())


class Elsewhere(Pad):
    """Under other names, one level down."""

    def __call__(self, features):
        ids, mask, labels = super().__call__(features).values()
        return {"text": {"tokens": ids, "is_real": mask}, "target": [labels]}


class Unpacks(Module):
    def loss(self, batch):
        ids, mask, labels = batch
        return self.model(ids, mask, labels=labels).loss


class LooksElsewhere(Module):
    def loss(self, batch):
        text = batch["text"]
        return self.model(text["tokens"], text["is_real"], labels=batch["target"][0]).loss


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}], ids=["here", "worker"])
@pytest.mark.parametrize(("make_module", "collator"), [(Unpacks, InOrder), (LooksElsewhere, Elsewhere)])
def test_batches_that_only_training_step_understands(tmp_path, make_module, collator, options):
    compare(tmp_path, make_module, lambda: loader(collator("right", 1), **options), max_epochs=2)


def test_a_loader_without_a_collator_of_batches(tmp_path):
    batches = [Pad("right", 1)(documents(4, seed=seed)) for seed in range(6)]

    class NoDataLoader:
        def __iter__(self):
            return iter(batches)

    compare(tmp_path, make_loader=lambda: torch.utils.data.DataLoader(batches, batch_size=None))
    compare(tmp_path, make_loader=NoDataLoader)


def test_labels_where_the_padding_is_keep_their_batches(tmp_path):
    class IdsAsLabels(Unpacks):
        def loss(self, batch):
            ids, mask, _ = batch
            return self.model(ids, mask, labels=ids).loss

    plugin, ours, stock = FastFTPlugin(), IdsAsLabels(), IdsAsLabels()
    for module, plugins in ((stock, None), (ours, [plugin])):
        make_trainer(tmp_path, plugins=plugins).fit(module, loader(InOrder("right", 1)))
    assert ours.losses == stock.losses
    assert "labels on padding positions" in plugin.report.features["packing"].reason


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["plain", "persistent"])
def test_loaders_that_were_made_before_the_run(tmp_path, options):
    """Lightning lets `LearningRateFinder` train before any other callback, and keeps the loaders it has made."""
    modules, callback = [], FastFTLightningCallback({"packing": "on"})
    for callbacks in ([], [callback]):
        finder, module = LearningRateFinder(num_training_steps=3), TuningItsRate()
        make_trainer(tmp_path, callbacks=[*callbacks, finder], max_epochs=2).fit(module, loader(**options))
        modules.append(module)
    stock, ours = modules
    assert_close(ours.losses, stock.losses, **EXACT)
    assert callback.report.features["packing"].metrics["packed_batches"] == 12


def test_rows_that_the_user_packed(tmp_path):
    def make_module():
        model = tiny_model()
        model.config.use_cache = False
        return Module(model)

    compare(tmp_path, make_module, lambda: loader(transformers.DataCollatorWithFlattening()))


def test_a_padding_free_collator_of_the_users_own(tmp_path):
    """Its batches have the metadata already, and stock Lightning would have to know what to do with it."""
    plugin, ours, stock = FastFTPlugin({"packing": "on"}), Module(), Module()
    make_trainer(tmp_path).fit(stock, loader())
    make_trainer(tmp_path, plugins=[plugin]).fit(ours, loader(PaddingFreeCollator(Pad("right", 1))))
    assert_close(ours.losses, stock.losses, **EXACT)


def test_gradient_checkpointing(tmp_path):
    def make_module():
        model = tiny_model().train()
        model.gradient_checkpointing_enable()
        return Module(model)

    assert compare(tmp_path, make_module).notes == []


def test_peft_model(tmp_path):
    peft = pytest.importorskip("peft")

    def make_module():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=8))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide a wrong gradient of lora_A
                torch.nn.init.normal_(parameter, std=0.1)
        return Module(model)

    compare(tmp_path, make_module)


class PadWithAHole(Pad):
    def __call__(self, features):
        batch = super().__call__(features)
        batch["attention_mask"][0, 1], batch["labels"][0, 1] = 0, -100
        return batch


def test_a_batch_that_cannot_be_packed_beside_one_that_can(tmp_path):
    class Two(Module):
        def loss(self, batch):
            return self.model(**batch["a"]).loss + self.model(**batch["b"]).loss

    plugin, ours, stock = FastFTPlugin(), Two(), Two()
    data = documents(22, shortest=4)
    for module, plugins in ((stock, None), (ours, [plugin])):
        loaders = {"a": loader(data=data), "b": loader(PadWithAHole(), data)}
        make_trainer(tmp_path, plugins=plugins).fit(module, loaders)
    assert_close(ours.losses, stock.losses, **EXACT)
    metrics = plugin.report.features["packing"].metrics
    assert metrics["packed_batches"] == metrics["unpacked_batches"] == len(ours.losses)


def test_several_loaders_at_once(tmp_path):
    class Two(Module):
        def loss(self, batch):
            return self.model(**batch["a"]).loss + 0.5 * self.model(**batch["b"][0]).loss

    plugin, ours, stock = FastFTPlugin({"packing": "on"}), Two(), Two()
    for module, plugins in ((stock, None), (ours, [plugin])):
        loaders = {"a": loader(), "b": [loader(data=documents(22, seed=4))]}
        make_trainer(tmp_path, plugins=plugins).fit(module, loaders)
    assert_close(ours.losses, stock.losses, **EXACT)
    assert plugin.report.features["packing"].metrics["packed_batches"] == 2 * len(ours.losses)


def test_a_data_module_and_validation(tmp_path):
    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(data=documents(7, seed=3))

    plugin, ours, stock = FastFTPlugin({"packing": "on"}), Module(), Module()
    trainers = make_trainer(tmp_path), make_trainer(tmp_path, plugins=[plugin])
    for trainer, module in zip(trainers, (stock, ours), strict=True):
        trainer.fit(module, datamodule=Data())
    assert_close(trainers[1].callback_metrics, trainers[0].callback_metrics, **EXACT)
    assert plugin.report.features["packing"].metrics["packed_batches"] == 6, "validation stays as it is"


@pytest.mark.parametrize("make_module", [OwnLoss, LabelsOfItsOwn])
def test_a_loss_that_may_not_be_the_models_keeps_its_padded_batches(tmp_path, make_module, caplog):
    plugin, ours, stock = FastFTPlugin(), make_module(), make_module()
    make_trainer(tmp_path).fit(stock, loader())
    with caplog.at_level(logging.WARNING, logger="fastft"):
        make_trainer(tmp_path, plugins=[plugin]).fit(ours, loader())
    assert ours.losses == stock.losses
    packing = plugin.report.features["packing"]
    assert not packing.enabled and "labels" in packing.reason and "packed_batches" not in packing.metrics
    assert len([record for record in caplog.records if record.name == "fastft"]) == 1


def test_another_loss_beside_the_models_is_found_before_anything_learns_from_it(tmp_path):
    plugin, ours, stock = FastFTPlugin(), OwnLossBesideTheModels(), OwnLossBesideTheModels()
    make_trainer(tmp_path).fit(stock, loader())
    make_trainer(tmp_path, plugins=[plugin]).fit(ours, loader())
    assert ours.losses[1:] == stock.losses, "the first step is computed again, from the padded batch"
    packing = plugin.report.features["packing"]
    assert not packing.enabled and "not the model's alone" in packing.reason


@pytest.mark.parametrize(
    ("make_module", "reason"), [(OwnLoss, "no labels"), (OwnLossBesideTheModels, "not the model's alone")]
)
def test_a_loss_of_ones_own_is_an_error_where_packing_must_be_on(tmp_path, make_module, reason):
    module = make_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FastFTError, match=reason):
        make_trainer(tmp_path, plugins=[FastFTPlugin({"packing": "on"})]).fit(module, loader())
    assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_an_optimizer_that_asks_for_a_step_several_times(tmp_path):
    class Lbfgs(Module):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)

    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    report = compare(tmp_path, Lbfgs, gradient_clip_val=None, tolerance=tolerance, losses_of_a_batch=2)
    assert "unpacked_batches" not in report.features["packing"].metrics


def test_switched_off_is_bitwise_stock(tmp_path):
    ours, stock = Module(), Module()
    make_trainer(tmp_path).fit(stock, loader())
    make_trainer(tmp_path, plugins=[FastFTPlugin({"packing": "off"})]).fit(ours, loader())
    assert ours.losses == stock.losses


def test_saved_checkpoints_are_stocks(tmp_path):
    saved = []
    for name, plugins in (("stock", None), ("ours", [FastFTPlugin()])):
        trainer = make_trainer(tmp_path, plugins=plugins)
        trainer.fit(Module(), loader())
        trainer.save_checkpoint(tmp_path / name)
        saved.append(torch.load(tmp_path / name, weights_only=True))
    stock, ours = saved
    assert ours.keys() == stock.keys() and ours["callbacks"] == stock["callbacks"]
    assert_close(ours["state_dict"], stock["state_dict"], **EXACT)


class SaveReport(lightning.Callback):
    """Processes of their own keep their report; this one brings it back."""

    def __init__(self, callback, path):
        self.callback, self.path = callback, path

    def on_fit_end(self, trainer, pl_module):
        (self.path / f"{trainer.global_rank}.json").write_text(json.dumps(self.callback.report.to_dict()))


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", "ddp_spawn"])
def test_two_processes(tmp_path, strategy, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):  # Lightning keeps them set
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    plugin, ours, stock = FastFTPlugin({"packing": "on"}), Module(), Module()
    make_trainer(tmp_path, strategy="ddp_fork", devices=2).fit(stock, loader())
    callbacks = [SaveReport(plugin.callback, tmp_path)]
    make_trainer(tmp_path, plugins=[plugin], callbacks=callbacks, strategy=strategy, devices=2).fit(ours, loader())
    assert_close(ours.state_dict(), stock.state_dict(), **EXACT)
    assert (ours.state_dict()["model.lm_head.weight"] != Module().state_dict()["model.lm_head.weight"]).any()
    for rank in range(2):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report["features"]["packing"]["metrics"]["packed_batches"] == 3
        assert report["state"] == "finished"


@pytest.mark.parametrize("switch", ["callback", "apply"])
def test_the_other_switches(tmp_path, switch):
    ours, stock = Module(), Module()
    make_trainer(tmp_path).fit(stock, loader())
    if switch == "callback":
        callback = FastFTLightningCallback({"packing": "on"})
        make_trainer(tmp_path, callbacks=[callback]).fit(ours, loader())
        report = callback.report
    else:
        trainer = make_trainer(tmp_path)
        with apply(trainer, {"packing": "on"}) as run:
            trainer.fit(ours, loader())
        report = run.report
        assert trainer.callbacks == make_trainer(tmp_path).callbacks == []
    assert_close(ours.losses, stock.losses, **EXACT)
    assert report.features["packing"].metrics["packed_batches"] == 6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("switch", ["callback", "apply"])
def test_fabric(precision, switch):
    losses, callback = [], FastFTLightningCallback({"packing": "on"})
    packing = PaddingFreeCollator(Pad("right", 1))
    for callbacks, collator in (([], None), ([callback] if switch == "callback" else [], packing)):
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision, callbacks=callbacks)
        model = tiny_model().train()
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
        losses.append([])
        with apply(model, {"packing": "on" if collator else "off"}) as run:
            for batch in fabric.setup_dataloaders(loader(collator)):
                loss = model(**batch).loss
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
    callback.close()
    tolerance = EXACT if precision == "32-true" else {"rtol": 2e-2, "atol": 2e-2}
    assert_close(losses[1], losses[0], **tolerance)
    assert run.report.features["packing"].metrics["packed_batches"] == 6
    assert not any(hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks))
