"""A step of Lightning's whose loss is not the model's own is run again, and then nothing shows that it ran twice."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning_helpers import Module, OwnLossBesideTheModels, loader, make_trainer
from torch.testing import assert_close

from fastft_lightning import FastFTLightningCallback


class Unsure(Module):
    """Weighs the model's loss by a function of the logits that no gradient flows through."""

    def loss(self, batch):
        output = self.model(**batch)
        confidence = output.logits.softmax(-1).amax(-1).mean().detach()
        return output.loss * (1 - confidence)


class Doubles(Module):
    """Decides by the logits."""

    def loss(self, batch):
        output = self.model(**batch)
        return output.loss * (2 if output.logits.std() > 0 else 1)


class Draws(OwnLossBesideTheModels):
    def loss(self, batch):
        return super().loss(batch) * (torch.rand(()) + random.random() + np.random.rand())


class LogsSums(OwnLossBesideTheModels):
    """Its first step logs under a name that is new, its second one adds to it."""

    def loss(self, batch):
        is_own = self.global_step > 0
        loss = super().loss(batch) if is_own else self.model(**batch).loss
        self.log("rows", float(len(batch["input_ids"])), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log(f"own {is_own}", loss, on_step=True, on_epoch=True)
        return loss


class ByShape(Module):
    """Asks the logits for nothing that padding could change."""

    def loss(self, batch):
        output = self.model(**batch)
        logits = output.logits
        assert logits.ndim == logits.dim() == 3 and logits.dtype == torch.float32 and logits.device.type == "cpu"
        assert logits.numel() == logits.shape.numel()
        return output.loss * (len(logits) / logits.size(0))


def fit_both(tmp_path, make_module):
    """Returns the stock module and ours, their Trainers' metrics and our report on packing."""
    modules, metrics, callback = [make_module(), make_module()], [], FastFTLightningCallback()
    for module, callbacks in zip(modules, ([], [callback]), strict=True):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        trainer = make_trainer(tmp_path, callbacks=callbacks)
        trainer.fit(module, loader())
        metrics.append(trainer.callback_metrics)
    return *modules, *metrics, callback.report.features["packing"]


@pytest.mark.parametrize("make_module", [Unsure, Doubles])
def test_what_is_made_from_logits_without_a_gradient(tmp_path, make_module):
    stock, ours, _, _, packing = fit_both(tmp_path, make_module)
    assert ours.losses[1:] == stock.losses
    assert not packing.enabled and "looks at the logits" in packing.reason


@pytest.mark.parametrize(("make_module", "repeated"), [(Draws, 0), (LogsSums, 1)])
def test_random_numbers_and_logged_values_are_stocks(tmp_path, make_module, repeated):
    stock, ours, stock_metrics, metrics, packing = fit_both(tmp_path, make_module)
    del ours.losses[repeated]
    assert_close(ours.losses, stock.losses, rtol=2e-6, atol=2e-6)
    assert_close(metrics, stock_metrics, rtol=2e-6, atol=2e-6)
    assert not packing.enabled and len(ours.losses) == 6


def test_the_shape_of_the_logits_gives_nothing_away(tmp_path):
    stock, ours, _, _, packing = fit_both(tmp_path, ByShape)
    assert_close(ours.losses, stock.losses, rtol=2e-6, atol=2e-6)
    assert packing.enabled and packing.metrics["packed_batches"] == 6
