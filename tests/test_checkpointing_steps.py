"""Steps that differ from the one that was measured: planned or not, they take no more than there is or stock takes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from checkpointing_helpers import Layer, Stack, assert_same, gradients, lazy_engine, make_input, stock
from simulated_device import SimulatedDevice
from test_checkpointing_planner import planned_on
from torch import nn

from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing.gradients import GradientsToCome
from fastft_plugins.checkpointing.planned import PlannedCheckpoint
from fastft_plugins.checkpointing.planner import Plan

DEPTH, WIDTH, ROWS = 6, 64, 512
MORE = [1.0, 1.2, 1.5, 2.0]  # memory, as a multiple of what stock takes


def frozen_at_first(device, checkpoint_fn):
    """Layers that are trained from the fourth step on, which have held nothing until then."""
    model = Stack(DEPTH, WIDTH)
    model.layers[:4].requires_grad_(False)
    for step in range(6):
        if step == 3:
            model.requires_grad_(True)
        with device:
            model(make_input(0, ROWS, WIDTH).detach(), checkpoint_fn).square().sum().backward()
        yield gradients(model)
        model.zero_grad()


class Attention(nn.Module):
    """Its scores grow with the square of the rows' length."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + (q @ k.transpose(-1, -2)).softmax(-1) @ v


def longer_rows(device, checkpoint_fn):
    """As many tokens in fewer, longer rows."""
    torch.manual_seed(0)
    model = nn.ModuleList(Attention() for _ in range(DEPTH))
    for batch, length in [(16, 64), (16, 64), (2, 512), (2, 512), (16, 64)]:
        x = torch.randn(batch, length, 32, requires_grad=True)
        with device:
            out = x
            for layer in model:
                out = checkpoint_fn(layer, out, use_reentrant=False)
            out.square().sum().backward()
            del out
        yield gradients(model, x)
        model.zero_grad()


def layer_called_again(device, checkpoint_fn):
    """A layer in the middle that is called three times in each forward."""
    layers = Stack(3, WIDTH).layers
    for _ in range(5):
        x = make_input(0, ROWS, WIDTH)
        with device:
            out = x
            for index in (0, 1, 1, 1, 2):
                out = checkpoint_fn(layers[index], out, use_reentrant=False)
            out.square().sum().backward()
            del out
        yield gradients(layers, x)
        layers.zero_grad()


@pytest.mark.parametrize("steps", [frozen_at_first, longer_rows, layer_called_again])
@pytest.mark.parametrize("more", MORE)
def test_other_steps_than_the_measured_one_fit(steps, more):
    plain = SimulatedDevice()
    expected = [[None if grad is None else grad.clone() for grad in found] for found in steps(plain, stock)]
    device = SimulatedDevice(int(more * plain.highest))
    ours = planned_on(device)
    for found, stocks in zip(steps(device, ours), expected, strict=True):
        assert_same(found, stocks)
    assert not ours.calls["retried"]
    # A layer that is called again looks like a second forward.
    assert bool(ours.calls["kept"]) == (steps is not layer_called_again)


def test_layers_that_are_frozen_and_have_rows_of_their_own_are_no_part_of_the_plan():
    """As the vision tower of a model whose language model is trained."""
    device = SimulatedDevice()
    ours, tower, model = planned_on(device), Stack(3, 16).requires_grad_(False), Stack(DEPTH, WIDTH)
    projector = nn.Linear(16, WIDTH)
    with device:
        for _ in range(3):
            seen = tower(make_input(1, 40, 16).detach(), ours)
            (model(projector(seen).sum(0) + make_input(0, ROWS, WIDTH), ours)).sum().backward()
    assert len(ours.planning.costs.whole) == DEPTH and ours.calls == {"kept": 2 * DEPTH}


@pytest.mark.parametrize("more", [1.07, 1.3, 2.0])
def test_gradients_that_an_accumulated_step_still_has_to_make_are_reckoned_with(more):
    """The second micro-batch is measured, when all gradients are there; the first one of the next step makes them."""

    def train(device, checkpoint_fn):
        with device:
            model = nn.ModuleDict({"stack": Stack(DEPTH, 128), "head": nn.Linear(128, 8000, bias=False)})
        if isinstance(checkpoint_fn, PlannedCheckpoint):
            checkpoint_fn.__init__(device, OffloadCheckpoint(), model)
        for _ in range(4):
            for _ in range(2):
                with device:
                    out = model["stack"](make_input(0, 2048, 128), checkpoint_fn)
                    model["head"](out[:8]).square().mean().backward()
                    del out
            model.zero_grad()

    plain = SimulatedDevice()
    train(plain, stock)
    device = SimulatedDevice(capacity=more * plain.highest, budget=0.94 * more * plain.highest)
    ours = planned_on(device)
    train(device, ours)
    assert not ours.calls["retried"] and (ours.calls["kept"] or more < 1.3)


@pytest.mark.parametrize("more", MORE)
def test_no_plan_counts_on_host_memory_that_is_not_there(more, monkeypatch):
    class Light(nn.Module):
        """What it holds is hardly more than its input."""

        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.linear(nn.functional.silu(self.norm(x)))

    def train(device, checkpoint_fn):
        torch.manual_seed(0)
        model = nn.ModuleList(Light() for _ in range(24))
        for _ in range(4):
            with device:
                out = make_input(0, ROWS, WIDTH)
                for layer in model:
                    out = checkpoint_fn(layer, out, use_reentrant=False)
                out.square().sum().backward()
                del out
            model.zero_grad()

    plain = SimulatedDevice()
    train(plain, stock)
    engine, _ = lazy_engine(monkeypatch, budget=0)
    device = SimulatedDevice(int(more * plain.highest))
    ours = planned_on(device, engine)
    train(device, ours)
    assert not ours.calls["offloaded"] + ours.calls["retried"] and "host memory" not in ours.explain()


def without_memory(engine):
    """Four steps on a device that has room for nothing; the first one is measured."""
    ours, model = planned_on(SimulatedDevice(budget=1), engine), Stack(DEPTH, WIDTH)
    for _ in range(4):
        with ours.planning._gauge:
            model(make_input(0, ROWS, WIDTH), ours).sum().backward()
    return ours


def test_after_host_memory_was_refused_none_is_planned_with_again(monkeypatch):
    engine, _ = lazy_engine(monkeypatch, budget=0)
    engine.holds = lambda sizes: True
    ours = without_memory(engine)
    assert ours.calls == {"offloaded": DEPTH, "checkpointed": 2 * DEPTH} and engine.refused == DEPTH


def test_an_input_that_stays_after_all_counts_as_memory_and_the_others_go_on(monkeypatch):
    engine, _ = lazy_engine(monkeypatch)
    calls, why_not = itertools.count(), engine._why_not
    engine._why_not = lambda source: "a view" if next(calls) % DEPTH == 2 else why_not(source)
    ours = without_memory(engine)
    assert ours.calls == {"offloaded": 3 * DEPTH} and engine.offloaded == 3 * (DEPTH - 1) and not engine.refused
    costs, plan = ours.planning.costs, Plan(DEPTH, offloads=True)
    assert costs.staying == {2}
    assert costs.need(plan, ROWS) > replace(costs, staying=frozenset()).need(plan, ROWS)


def test_gradients_to_come_follow_what_is_trained():
    layer = nn.Linear(4, 3)
    of_layer, of_nothing = GradientsToCome(layer), GradientsToCome(None)
    assert of_layer.nbytes() == 0
    of_layer.look_again()
    assert of_layer.look() == (4 * 15, (2, 4 * 15))
    layer.weight.requires_grad_(False)
    assert of_layer.look() == (4 * 3, (1, 4 * 3))
    layer.requires_grad_(True)(torch.ones(4)).sum().backward()
    assert of_layer.look() == (0, (2, 4 * 15))
    layer.weight = nn.Parameter(torch.ones(3, 4))
    assert of_layer.nbytes() == 0
    of_layer.look_again()
    assert of_layer.nbytes() == 4 * 12
    del layer
    for each in (of_layer, of_nothing):
        assert each.nbytes() == 0
        each.look_again()
        assert each.look() == (0, (0, 0))


def test_a_function_that_is_compiled_inside_a_layer_stays_compiled():
    @torch.compile(backend="aot_eager")
    def activation(x):
        return torch.tanh(x) * torch.sigmoid(x)

    class Compiled(Layer):
        def forward(self, x):
            return x + self.down(activation(self.up(x)))

    model, found = nn.ModuleList(Compiled(index, WIDTH) for index in range(3)), []
    ours = planned_on(SimulatedDevice())
    for checkpoint_fn in (stock, ours, ours, ours, stock):
        model.zero_grad()
        out = make_input(0, 8, WIDTH)
        for layer in model:
            out = checkpoint_fn(layer, out, use_reentrant=False)
        out.sum().backward()
        found.append([grad.clone() for grad in gradients(model)])
    for grads in found[1:]:
        assert_same(grads, found[0])
    assert ours.calls["kept"] == 2 * 3
