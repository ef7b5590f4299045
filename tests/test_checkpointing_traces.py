"""A layer that runs out of memory, and whose call may have left traces by then: it is not run a second time."""

from __future__ import annotations

import pytest
import torch
from checkpointing_helpers import WIDTH, Stack, make_input
from simulated_device import SimulatedDevice
from torch import nn

from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing.planned import PlannedCheckpoint


class Late(nn.Module):
    """The end of a layer, at which memory may have run out."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def forward(self, x):
        if self.errors:
            raise self.errors.pop()
        return x


class Noting:
    """A hook like those of transformers, which note the router logits that the loss is made from."""

    def __init__(self):
        self.notes = 0

    def __call__(self, *_):
        self.notes += 1


def step(model, planned):
    model(make_input(0), planned).sum().backward()


def after_the_error(change):
    """What ``change`` makes of a layer that runs out of memory in the fourth step, and what the planner did then."""
    model, planned = Stack(), PlannedCheckpoint(SimulatedDevice(), OffloadCheckpoint())
    layer = model.layers[2]
    layer.dropout = Late()
    seen = change(layer)
    for _ in range(3):
        step(model, planned)
    assert planned.calls["kept"] == 4 and planned.forwards == 1
    layer.dropout.errors.append(torch.OutOfMemoryError("fragmented"))
    return model, planned, seen


def hook(layer):
    layer.up.register_forward_hook(noting := Noting())
    return lambda: noting.notes


def pre_hook(layer):
    layer.up.register_forward_pre_hook(noting := Noting())
    return lambda: noting.notes


def batch_norm(layer):
    layer.up = nn.Sequential(layer.up, norm := nn.BatchNorm1d(2 * WIDTH))
    return lambda: norm.num_batches_tracked.item()


@pytest.mark.parametrize("change", [hook, pre_hook, batch_norm])
def test_a_layer_whose_call_leaves_traces_is_not_run_again(change):
    model, planned, seen = after_the_error(change)
    before = seen()
    with pytest.raises(torch.OutOfMemoryError, match="fragmented"):
        step(model, planned)
    assert seen() == before + 1 and not planned.calls["retried"]
    assert planned.planning._shortfall > 0, "the next ones are planned as if nothing had happened"
    model.zero_grad()
    step(model, planned)


def test_without_traces_it_is_run_again():
    model, planned, _ = after_the_error(lambda layer: layer)
    step(model, planned)
    assert planned.calls["retried"] == 1 and planned.planning._shortfall > 0


def test_a_batch_norm_that_does_not_train_leaves_none():
    model, planned, _ = after_the_error(lambda layer: batch_norm(layer) and layer.up[1].eval())
    step(model, planned)
    assert planned.calls["retried"] == 1
