"""What changes in the course of a training: layers, what they hold, and the forwards. Plans follow, and nothing fails
that fits with torch's checkpointing."""

from __future__ import annotations

from checkpointing_helpers import Stack, make_input, stock
from simulated_device import SimulatedDevice
from test_checkpointing_planner import planned_on


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
