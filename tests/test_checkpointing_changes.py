"""What changes in the course of a training: layers, what they hold, and the forwards. Plans follow, and nothing fails
that fits with torch's checkpointing."""

from __future__ import annotations

import pytest
import torch
from checkpointing_helpers import Layer, Stack, assert_same, gradients, make_input, stock
from simulated_device import SimulatedDevice
from test_checkpointing_planner import planned_on
from torch import nn

from fastft_plugins.checkpointing.gradients import GradientsToCome
from fastft_plugins.checkpointing.planner import Plan

DEPTH, WIDTH, ROWS = 6, 64, 512


def train(device, checkpoint_fn, model, steps, *, before=lambda step: None, rows=lambda step: ROWS, forwards=1):
    """The planned forwards after each step of a model; ``before``, ``rows`` and ``forwards`` are asked in each one."""
    found = []
    for step in range(steps):
        before(step)
        with device:
            outs = []
            for _ in range(forwards(step) if callable(forwards) else forwards):
                out = make_input(step, rows(step), WIDTH).detach()
                for layer in model:
                    out = checkpoint_fn(layer, out, use_reentrant=False)
                outs.append(out)
            sum(each.square().sum() for each in outs).backward()
            del out, outs
        for parameter in model.parameters():
            parameter.grad = None
        found.append(getattr(checkpoint_fn, "forwards", 0))
    return found


def test_a_lower_layer_that_is_trained_later_begins_the_forward():
    model, device = Stack(DEPTH, WIDTH).layers, SimulatedDevice()
    model[0].requires_grad_(False)
    ours = planned_on(device)
    forwards = train(device, ours, model, 10, before=lambda step: step == 5 and model.requires_grad_(True))
    assert forwards[-1] >= 7, forwards
    assert ours.calls["kept"] >= 4 * (DEPTH - 1) + 3 * DEPTH


def test_forwards_that_once_overlapped_may_do_so_again():
    """Every 20th step, two forwards wait for one backward; the first time is before there is a plan."""

    def run(device, checkpoint_fn):
        pairs = {"forwards": lambda step: 2 if step % 20 == 0 else 1}
        return train(device, checkpoint_fn, Stack(DEPTH, WIDTH).layers, 32, **pairs)

    plain = SimulatedDevice()
    run(plain, stock)
    device = SimulatedDevice(int(1.3 * plain.highest))
    device.budget = 0.94 * device.capacity
    ours = planned_on(device)
    assert run(device, ours)[-1] == 0
    assert "from then on" in ours.explain()


@pytest.mark.parametrize("change", ["frozen", "replaced"])
def test_layers_that_go_leave_no_gap(change):
    """Longer rows later are measured all the same."""
    model, device = Stack(DEPTH, WIDTH).layers, SimulatedDevice()
    ours = planned_on(device)

    def before(step):
        if step == 3 and change == "frozen":
            model[:2].requires_grad_(False)
        elif step == 3:
            model[2] = Layer(9, WIDTH)

    forwards = train(device, ours, model, 9, before=before, rows=lambda step: ROWS if step < 5 else 2 * ROWS)
    assert forwards[-1] - forwards[-4] == 3, forwards
    assert len(ours.planning.costs.whole) == (DEPTH - 2 if change == "frozen" else DEPTH)


def test_rows_of_clearly_different_lengths_in_turns_are_all_planned():
    model, device = Stack(2, WIDTH).layers, SimulatedDevice()
    ours = planned_on(device)
    with device:
        for step in range(8):
            out = torch.randn(*[(27, 30), (2, 300)][step % 2], WIDTH)
            for layer in model:
                out = ours(layer, out)
            out.sum().backward()
            del out
    assert ours.forwards == 6


class Adapted(nn.Module):
    """Its weights may be frozen, all but an adapter's; it may take a mask."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.adapter = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None):
        out = x
        for weights in self.weights:
            out = weights(out) + 1
        return out + self.adapter(x) if mask is None else (out * 2).softmax(-1).sigmoid().exp() * mask


@pytest.mark.parametrize("change", ["unfrozen", "autocast", "mask"])
@pytest.mark.parametrize("more", [1.1, 1.5, 2.0])
def test_layers_that_come_to_hold_more_are_measured_anew(change, more):
    def run(device, checkpoint_fn):
        torch.manual_seed(0)
        model = nn.ModuleList(Adapted() for _ in range(DEPTH))
        if change == "unfrozen":
            for layer in model:
                layer.weights.requires_grad_(False)
        if hasattr(checkpoint_fn, "planning"):
            checkpoint_fn.planning.gradients = GradientsToCome(model)
        for step in range(8):
            is_late = step >= 4
            if is_late:
                model.requires_grad_(True)
            mask = {"mask": torch.ones(WIDTH)} if change == "mask" and is_late else {}
            with device, torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast" and not is_late):
                out = torch.randn(4 * ROWS, WIDTH)
                for layer in model:
                    out = checkpoint_fn(layer, out, use_reentrant=False, **mask)
                out.float().square().sum().backward()
                del out
            model.zero_grad()

    plain = SimulatedDevice()
    run(plain, stock)
    device = SimulatedDevice(budget=more * plain.highest)
    ours = planned_on(device)
    run(device, ours)
    assert device.highest <= device.budget and ours.forwards >= 4


class Growing(nn.Module):
    """Gets one product more; those cost the host less than the layer costs the device."""

    def __init__(self):
        super().__init__()
        self.layers, self.used = nn.ModuleList(nn.Linear(256, 256) for _ in range(3)), 2

    def forward(self, x):
        out = x
        for layer in self.layers[: self.used]:
            out = torch.sigmoid(layer(out)).sin()
        for _ in range(8):
            out = torch.sigmoid(out).sin()
        return x + out


def test_layers_whose_products_have_changed_for_good_are_measured_anew():
    device = SimulatedDevice()
    device.milliseconds = lambda begin, end: 1e6  # the host has time
    ours, model, found = planned_on(device), nn.ModuleList(Growing() for _ in range(3)), []

    def step(index):
        with device:
            out = make_input(index, ROWS, 256)
            for layer in model:
                out = ours(layer, out)
            out.sum().backward()

    step(0)
    step(1)
    stored = ours.planning.costs.stored
    device.budget = device.allocated() + ours.planning.costs.need(Plan(0, 2), ROWS) * 1.3
    for index in range(16):
        for layer in model:
            layer.used = 2 + (index >= 3)
        step(index)
        found.append(ours.planning.costs.stored == stored)
    assert ours.calls["stored"] and found[8] and not found[-1], (found, ours.calls)
    assert not any(products.is_outdated for products in ours.planning.measured.products.values())


@pytest.mark.parametrize("more", [1.2, 1.5, 2.0])
def test_what_a_step_takes_beyond_its_plan_is_left_free_from_then_on(more):
    """Dropout that is switched on, which nothing shows before the backward."""

    class Dropping(nn.Module):
        p = 0.0

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x):
            up = nn.functional.dropout(torch.relu(self.up(x)), self.p, training=self.p > 0)
            return x + self.down(up)

    def peaks(device, checkpoint_fn):
        model, found = nn.ModuleList(Dropping() for _ in range(DEPTH)), []

        def before(step):
            for layer in model:
                layer.p = 0.5 * (step >= 4)
            found.append(device.highest)
            device.highest = 0

        train(device, checkpoint_fn, model, 8, before=before)
        return [*found[1:], device.highest]

    device = SimulatedDevice(budget=more * max(peaks(SimulatedDevice(), stock)))
    found = peaks(device, planned_on(device))
    assert found[3] <= device.budget < found[4] and max(found[5:]) <= device.budget


def test_steps_that_go_as_planned_leave_nothing_free():
    device = SimulatedDevice(budget=4_000_000)
    ours = planned_on(device)
    train(device, ours, Stack(DEPTH, WIDTH).layers, 8, rows=lambda step: ROWS - 20 * (step % 3))
    assert ours.calls["kept"] and ours.planning.measured.excess == 0


@pytest.mark.parametrize("more", [1.1, 1.4])
def test_a_step_that_runs_out_of_memory_in_the_loss_or_backward_is_the_only_one(more):
    """A second loss sets in, and the loop goes on without a batch that fails."""

    def run(device, checkpoint_fn):
        model, failed = Stack(DEPTH, WIDTH).layers, []
        for step in range(20):
            try:
                with device:
                    out = make_input(step, ROWS, WIDTH)
                    for layer in model:
                        out = checkpoint_fn(layer, out, use_reentrant=False)
                    loss = out.square().sum()
                    if step >= 5:
                        loss = loss + (out @ torch.ones(WIDTH, 1500)).log_softmax(-1).sum()
                    loss.backward()
            except torch.OutOfMemoryError:
                failed.append(step)
            out = loss = None
            model.zero_grad()
        return failed

    plain = SimulatedDevice()
    run(plain, stock)
    device = SimulatedDevice(int(more * plain.highest))
    device.budget = 0.9 * device.capacity
    ours = planned_on(device)
    assert run(device, ours) == [5] and ours.forwards >= 15 and ours.calls["kept"]


def test_a_graph_that_an_error_of_memory_holds_on_to_is_no_overlap():
    device = SimulatedDevice()
    ours, model, held = planned_on(device), Stack(DEPTH, WIDTH), []
    with device:
        for step in range(6):
            loss = model(make_input(step, ROWS, WIDTH), ours).sum()
            if step == 2:  # fails in the loss
                held.append(loss)
                device._failures += 1
            else:
                loss.backward()
    assert ours.forwards == 4, "the first one is measured, and the one after the error"


def test_checkpointed_layers_inside_of_one_that_is_kept_are_no_layers_of_their_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stack(2, WIDTH)

        def forward(self, x):
            return self.inner(x, ours)

    device = SimulatedDevice()
    ours, model = planned_on(device), nn.ModuleList(Outer() for _ in range(3))
    forwards = train(device, ours, model, 6)
    assert forwards == [0, 1, 2, 3, 4, 5] and ours.calls == {"kept": 5 * 3}


class Last(nn.Module):
    """Its last operation needs its output in the backward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def test_a_layer_whose_output_is_changed_in_place_is_not_kept():
    device, found = SimulatedDevice(), []
    ours, model = planned_on(device), nn.ModuleList(Last() for _ in range(4))
    for checkpoint_fn in (stock, ours, ours, ours):
        x = make_input(0, ROWS, WIDTH)
        with device:
            out = x
            for index, layer in enumerate(model):
                out = checkpoint_fn(layer, out, use_reentrant=False)
                if index % 2:
                    out.mul_(1.5)
            out.square().sum().backward()
            del out
        found.append([grad.clone() for grad in gradients(model, x)])
        model.zero_grad()
    for grads in found[1:]:
        assert_same(grads, found[0])
    assert ours.calls == {"kept": 2 * 2, "checkpointed": 2 * 2}
