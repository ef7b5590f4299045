"""Products in host memory: the gradients of torch's checkpointing, fewer products, and less memory than stored ones."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpointing_helpers import (
    SCHEDULES,
    Stack,
    assert_as_stock,
    assert_same,
    gradients,
    lazy_engine,
    make_input,
    stock,
)
from hypothesis import given
from hypothesis import strategies as st
from simulated_device import SimulatedDevice
from test_checkpointing_planner import ROOM, TOKENS, costs, planned_on
from test_checkpointing_products import DEPTH, ROWS, WIDTH, CountOperations, LightStack, PatientHost, wide_steps
from torch import nn

from fastft_plugins.checkpointing import measurement as measurement_module
from fastft_plugins.checkpointing import planning as planning_module
from fastft_plugins.checkpointing import product_modes as modes_module
from fastft_plugins.checkpointing import products as products_module
from fastft_plugins.checkpointing.handle import Handle
from fastft_plugins.checkpointing.planner import Costs, Plan, choose, with_others_stored
from fastft_plugins.checkpointing.products import LayerProducts
from fastft_plugins.kernels.transfer import CudaTransfer, _Copy

STEPS = 8  # two that are measured, three in which products are checked, and some with them copied
LARGER = ROWS * 2 * WIDTH * 4  # bytes of the larger one of a layer's two products


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(products_module, "MIN_BYTES", 1)
    engine, lazy = lazy_engine(monkeypatch)
    lazy.bytes_a_millisecond = bytes_a_millisecond(1.1 * LARGER)
    yield engine
    lazy.drain()
    assert not lazy.corrupted


def bytes_a_millisecond(products):
    """Of a link with time for so many bytes of products, besides the input, while a layer of `PatientHost` runs."""
    return (products + LARGER / 2) / 0.8 / PatientHost().milliseconds(0, 0)


@pytest.fixture(scope="module")
def expected():
    return wide_steps(SimulatedDevice(), stock, STEPS)


def room_for(stored):
    """Memory for a step in which the inputs are offloaded and the products of so many layers are stored."""
    found = planned_on(PatientHost(budget=0))
    wide_steps(found.planning._gauge, found, 3)
    _, room, *_ = found.planning.longest
    return found.planning.costs.need(Plan(DEPTH - stored, stored, offloads=True), ROWS) - room + 64  # a few flags


@pytest.mark.parametrize("stored", range(2, DEPTH))
def test_what_has_no_room_on_the_device_is_copied_and_never_more_taken_than_there_is(stored, engine, expected):
    device = PatientHost(room_for(stored))
    ours = planned_on(device, engine)
    for got, other in zip(wide_steps(device, ours, STEPS), expected, strict=True):
        assert_same(got, other)
    assert not ours.calls["retried"]
    assert ours.plan.copied and "of the products of each layer" in ours.explain()


def test_what_is_copied_is_not_computed_again(engine):
    device = PatientHost(room_for(2))
    ours, model, products = planned_on(device, engine), LightStack(), []
    for _ in range(STEPS):
        model.zero_grad()
        x = make_input(0, ROWS, WIDTH)
        with CountOperations() as counted, device:
            model(x, ours).square().sum().backward()
        products.append(counted.calls[torch.ops.aten.addmm.default])
    # Each of a layer's two is computed again, until all layers have been checked.
    plan = ours.plan
    assert products[:4] == [4 * DEPTH] * 4 and products[-2:] == [2 * DEPTH + plan.checkpointed] * 2
    assert plan.copied == (frozenset({0}),) * DEPTH and plan.checkpointed


def test_nothing_is_copied_before_it_was_checked(engine, monkeypatch):
    """A kernel that writes over a product without torch's knowing would race with its copy."""
    offload_product, copied, counts = Handle.offload_product, [], []
    monkeypatch.setattr(Handle, "offload_product", lambda *args: copied.append(args) or offload_product(*args))
    layer, products = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), LayerProducts()
    contexts = functools.partial(products.contexts, offloaded=frozenset(range(9)))
    for _ in range(2):
        x = make_input(0, 8, WIDTH)
        engine(layer, x, contexts=contexts).sum().backward()
        counts.append(len(copied))
    assert counts == [0, 1]  # the second product is the output, which the recompute does not come to


def test_where_nothing_can_be_checked_nothing_is_copied(engine, expected):
    device = PatientHost(budget=1)
    ours = planned_on(device, engine)
    for got, other in zip(wide_steps(device, ours, STEPS), expected, strict=True):
        assert_same(got, other)
    assert not ours.plan.copied and not ours.calls["stored"]


@pytest.mark.parametrize("speed", [None, 0.0])
def test_a_link_of_unknown_or_no_speed_copies_inputs_alone(speed, engine, expected, monkeypatch):
    monkeypatch.setattr(engine, "speed", lambda: speed)
    device = PatientHost(room_for(2))
    ours = planned_on(device, engine)
    for got, other in zip(wide_steps(device, ours, STEPS), expected, strict=True):
        assert_same(got, other)
    assert not ours.plan.copied and ours.calls["offloaded"]


def test_a_small_budget_of_host_memory_copies_inputs_alone(monkeypatch, expected):
    monkeypatch.setattr(products_module, "MIN_BYTES", 1)
    engine, lazy = lazy_engine(monkeypatch, budget=DEPTH * ROWS * WIDTH * 5)
    lazy.bytes_a_millisecond = bytes_a_millisecond(1.1 * LARGER)
    device = PatientHost(room_for(2))
    ours = planned_on(device, engine)
    for got, other in zip(wide_steps(device, ours, STEPS), expected, strict=True):
        assert_same(got, other)
    assert not ours.plan.copied and ours.calls["offloaded"]


def copying(monkeypatch, engine, stored):
    """Copies every product of every layer, and says how many it has copied."""
    monkeypatch.setattr(modes_module, "MIN_WIDTH", 1)
    monkeypatch.setattr(measurement_module, "_WORTH", torch.inf)
    monkeypatch.setattr(engine, "speed", lambda: 1.0)
    offload_product, copied = Handle.offload_product, []

    def count(handle, product):
        copied.append(offload_product(handle, product))
        return copied[-1]

    def plan(costs, *_, copied=(), **__):
        depth = len(costs.whole)
        return Plan(0, depth, True, copied) if stored or not copied else Plan(depth, 0, True, copied)

    monkeypatch.setattr(Handle, "offload_product", count)
    monkeypatch.setattr(planning_module, "choose", plan)
    return planned_on(PatientHost(budget=float("inf")), engine), copied


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_every_schedule_gives_the_gradients_of_torch_checkpointing(schedule, stored, engine, monkeypatch):
    ours, copied = copying(monkeypatch, engine, stored)
    assert_as_stock(schedule, ours)
    assert None not in copied
    assert bool(copied) == (schedule.__name__ == "several_steps")  # in the others each model makes one or two steps


@pytest.mark.parametrize("stored", [False, True])
def test_graphs_of_many_steps_in_any_order_give_the_gradients_of_torch_checkpointing(stored, engine, monkeypatch):
    ours, copied = copying(monkeypatch, engine, stored)
    assert_same(many_steps(ours), many_steps(stock))
    assert len(copied) > 20 and None not in copied


def many_steps(checkpoint_fn):
    """Enough for everything to be copied, then backwards that come twice, half-way and not at all."""
    torch.manual_seed(1)
    model, found = Stack(), []
    for step in range(12):
        model.zero_grad()
        x = make_input(step, rows=5 + step % 3)
        if step == 8:
            model(x, checkpoint_fn)
        middle = checkpoint_fn(model.layers[0], x, use_reentrant=False)
        out = middle
        for layer in model.layers[1:]:
            out = checkpoint_fn(layer, out, use_reentrant=False)
        loss = out.square().sum()
        if step == 6:
            found += torch.autograd.grad(loss, [middle], retain_graph=True)
        loss.backward(retain_graph=step in (7, 10))
        if step == 7:
            loss.backward()
        if step == 9:
            with torch.no_grad():
                model(x, checkpoint_fn)
        found += [grad.clone() for grad in gradients(model, x)]
    return found


class Event:
    """Of a copy that took ``milliseconds`` and may have been done."""

    def __init__(self, milliseconds=2.0, is_done=True, when_asked=lambda: None):
        self.milliseconds, self.is_done, self.when_asked = milliseconds, is_done, when_asked

    def query(self):
        self.when_asked()
        return self.is_done

    def elapsed_time(self, end):
        return end.milliseconds


@pytest.fixture
def waiting(monkeypatch):
    """A queue, and a wait in it for a copy of ten bytes."""
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: None)
    transfer, stream = CudaTransfer(torch.device("cuda")), SimpleNamespace(record_event=id, wait_event=id)

    def wait(**event):
        transfer.wait(stream, _Copy(10, Event(), Event(**event)))

    return transfer, wait


def test_copies_that_finalisers_wait_for_do_not_disturb_the_measured_speed(waiting):
    transfer, wait = waiting
    for _ in range(3):
        wait(when_asked=wait)
    assert transfer.speed() == 5.0


def test_the_speed_is_found_anew_only_after_as_many_further_copies(waiting):
    transfer, wait = waiting
    asked = []
    wait(is_done=False)
    assert transfer.speed() is None
    for milliseconds, expected in ((2.0, 5.0), (5.0, 20 / 7), (5.0, 20 / 7), (5.0, 40 / 17)):
        wait(milliseconds=milliseconds, when_asked=lambda: asked.append(1))
        assert transfer.speed() == pytest.approx(expected)
    assert len(asked) == 1 + 2 + 4


# The closed function


@st.composite
def links(draw):
    found = draw(costs())
    return found, found.largest(draw(st.integers(1, 5000)))


@given(links(), TOKENS, ROOM)
def test_copying_never_runs_more_again_and_fits(case, tokens, room):
    found, copied = case
    plan, without = choose(found, tokens, room, copied=copied), choose(found, tokens, room)
    assert found.again(plan) <= found.again(without)
    if found.need(without, tokens) <= room:
        assert found.need(plan, tokens) <= room
    if plan.copied:
        assert found.again(plan) < found.again(without)


@given(links(), TOKENS)
def test_what_is_copied_takes_room_only_in_the_layers_that_run(case, tokens):
    found, copied = case
    growth, depth = tokens / found.tokens, len(found.whole)
    most = max(found.bytes_of(copied)) * growth
    for stored in range(depth + 1):
        plan = Plan(depth - stored, stored, offloads=True, copied=copied)
        need, without = found.need(plan, tokens), found.need(replace(plan, copied=()), tokens)
        assert need <= without + 2 * most + growth * max(found.inputs) + 1e-6


def test_the_largest_products_that_fit_are_copied():
    found = Costs(
        tokens=10, whole=(99,) * 2, inputs=(9,) * 2, products=((4, 20, 8), ()), fixed=(0,) * 2, rest=(0,) * 2, loss=0
    )
    assert found.largest(27) == ({1, 0}, set())
    assert found.largest(28, least=5) == ({1, 2}, set())
    assert found.largest(10) == ({2}, set()) and found.largest(3) == ()
    assert found.bytes_of(found.largest(28)) == (28, 0)


def test_where_a_layer_to_be_checked_has_no_room_the_others_are_stored_all_the_same():
    found = Costs(
        tokens=1,
        whole=(200, 50, 50),
        inputs=(1,) * 3,
        products=((90,), (9,), (9,)),
        fixed=(0,) * 3,
        rest=(0,) * 3,
        loss=0,
    )
    plan = Plan(2, 1, offloads=True)
    room = found.need(plan, 1)
    assert with_others_stored(found, plan, [0, 1], 1, room).instead == (1,)
    assert with_others_stored(found, plan, [0], 1, room) == plan


def test_products_have_the_next_layers_forward_to_be_copied_in(engine):
    x = make_input(0).detach()
    lane = engine._lane(x.device)
    transfer, handles, products = lane.transfer, [], []
    for _ in range(3):
        handles.append(lane.offload(x.clone()))
        products.append(handles[-1].offload_product(x.clone()))
        assert len(transfer._queue) == min(4, 2 * len(handles))
    taken = [handle.take_product(product) for handle, product in zip(handles, products, strict=True)]
    assert all(torch.equal(each, x) for each in taken)
