"""Stored products: the gradients of torch's checkpointing, with fewer products, in the memory that was planned."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from checkpointing_helpers import (
    SCHEDULES,
    Layer,
    Stack,
    assert_as_stock,
    assert_same,
    gradients,
    lazy_engine,
    make_input,
    stock,
)
from simulated_device import SimulatedDevice
from test_checkpointing_planner import planned_on
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing import measurement as measurement_module
from fastft_plugins.checkpointing import product_modes as modes_module
from fastft_plugins.checkpointing import products as products_module
from fastft_plugins.checkpointing.product_modes import MIN_WIDTH
from fastft_plugins.checkpointing.products import LayerProducts
from fastft_plugins.kernels.download import Download

DEPTH, WIDTH, ROWS = 4, MIN_WIDTH, 2048
plain = functools.partial(checkpoint, use_reentrant=False)


class Storing:
    """Stores the products of each layer; the first call of a layer finds out which can be looked up."""

    def __init__(self):
        self.layers = {}

    def __call__(self, layer, *args):
        products = self.layers.setdefault(layer, LayerProducts())
        return checkpoint(layer, *args, use_reentrant=False, context_fn=products.contexts)


class Copying(Storing):
    """Keeps them in host memory."""

    def __init__(self, engine):
        super().__init__()
        self.engine = engine

    def __call__(self, layer, *args):
        products = self.layers.setdefault(layer, LayerProducts())
        return self.engine(layer, *args, contexts=functools.partial(products.contexts, offloaded=frozenset(range(99))))


@pytest.fixture(params=["device", "host"])
def storing(request, monkeypatch):
    if request.param == "device":
        return Storing()
    monkeypatch.setattr(products_module, "MIN_BYTES", 1)
    engine, lazy = lazy_engine(monkeypatch)
    request.addfinalizer(lambda: lazy.drain() or (lazy.corrupted and pytest.fail(str(lazy.corrupted))))
    return Copying(engine)


class LateDownload(Download):
    """Is there when it is asked for the third time."""

    asked = 0

    def get(self):
        self.asked += 1
        return super().get() if self.asked > 2 else None


def test_until_the_host_has_learned_what_came_out_the_same_all_is_computed_again(monkeypatch, storing):
    monkeypatch.setattr(products_module, "Download", LateDownload)
    layer, x, products = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), make_input(0, 8, WIDTH), []
    for _ in range(5):
        with CountOperations() as counted:
            storing(layer, x).sum().backward()
        products.append(counted.calls[torch.ops.aten.addmm.default])
    assert products == [2, 2, 2, 1, 1]


class PatientHost(SimulatedDevice):
    """A device so slow that the host has time to spare."""

    def milliseconds(self, begin, end):
        return 1e9


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """Attention, a narrow product as LoRA's second one, and an in-place activation."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.narrow = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH))
        self.dropout = dropout

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(-2, -3) for layer in (self.q, self.k, self.v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        out = self.o(out.transpose(-2, -3).flatten(-2))
        return nn.functional.dropout(nn.functional.relu(out, inplace=True) + self.narrow(x), 0.3)


class Branches(nn.Module):
    """A layer whose calls take as many of its products as they are told."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, count):
        for layer in list(self.layers)[-count:]:
            x = layer(x).sin()
        return x


class Light(Layer):
    """A layer that holds far more than its products."""

    def forward(self, x):
        out = self.up(x)
        for _ in range(4):
            out = torch.sin(torch.tanh(out))
        return x + self.dropout(self.down(out))


class LightStack(Stack):
    def __init__(self):
        super().__init__(0)
        self.layers = nn.ModuleList(Light(index, WIDTH) for index in range(DEPTH))


def train(model, checkpoint_fn, x, runs=1):
    torch.manual_seed(5)
    model.zero_grad()
    x.grad = None
    out = x
    for layer in model:
        out = checkpoint_fn(layer, out)
    for run in range(runs):
        out.square().sum().backward(retain_graph=run < runs - 1)
    return [*gradients(model, x), torch.get_rng_state()]


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(3)), torch.randn(2, 16, WIDTH, requires_grad=True)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("runs", [1, 2])
def test_the_same_gradients_with_fewer_products(blocks, runs, dropout, storing):
    model, x = blocks
    for block in model:
        block.dropout = dropout
    found, products = [], []
    for checkpoint_fn in (plain, storing, storing, storing):
        with CountOperations() as counted:
            found.append(train(model, checkpoint_fn, x, runs))
        products.append(counted.calls[torch.ops.aten.addmm.default])
    for ours in found[1:]:
        assert_same(ours, found[0])
    # At first all is computed, then q, k, v and o of each block are looked up; in a second backward nothing is.
    assert products[1] == products[0] and products[2] == products[3] == products[0] - 3 * 4


def test_attention_is_stored_only_where_it_draws_no_random_numbers():
    draws = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.randn(1, 4, 16, 64)
    assert modes_module.is_product(draws, (q, q, q), {})
    assert modes_module.is_product(draws, (q, q, q, 0.0), {})
    assert not modes_module.is_product(draws, (q, q, q, 0.1), {})
    assert not modes_module.is_product(draws, (q, q, q), {"dropout_p": 0.1})


LINEAR = nn.Linear(WIDTH, WIDTH)
WITHOUT_BIAS = nn.Linear(WIDTH, WIDTH, bias=False)


def changed(x):
    return LINEAR(LINEAR(x).mul_(2).add_(1)).sin()


def changed_through_a_view(x):
    """In rows of three dimensions the product without a bias is behind a view that counts versions by itself."""
    out = WITHOUT_BIAS(x)
    out += x
    return WITHOUT_BIAS(out.tanh() * out)


def changed_by_nothing_at_first(x):
    """As LoRA, whose update begins at zero: what the first step shows is not enough."""
    out = WITHOUT_BIAS(x)
    out += x * SCALE
    return WITHOUT_BIAS(out.tanh() * out)


def scores(x):
    products = x @ x.transpose(-1, -2)
    products /= 16
    return products.softmax(-1) @ x


class Rotate(torch.autograd.Function):
    """Writes over its input without telling, as some kernels do."""

    @staticmethod
    def forward(ctx, x):
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.Python, True):
            numpy_view(x)[...] *= -1
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def numpy_view(x):
    return x.detach().numpy()


def changed_by_a_kernel(x):
    return WITHOUT_BIAS(Rotate.apply(WITHOUT_BIAS(x)).tanh())


SCALE = torch.zeros(())


@pytest.mark.parametrize(
    "function", [changed, changed_through_a_view, changed_by_nothing_at_first, scores, changed_by_a_kernel]
)
def test_what_was_changed_in_place_is_computed_again(function, storing):
    found, x = {}, torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for step in range(4):
        SCALE.fill_(float(step > 1))
        for checkpoint_fn in (plain, storing):
            for each in (x, *LINEAR.parameters(), *WITHOUT_BIAS.parameters()):
                each.grad = None
            checkpoint_fn(function, x).square().sum().backward()
            found[checkpoint_fn] = [each.grad for each in (x, *LINEAR.parameters(), *WITHOUT_BIAS.parameters())]
        assert_same(found[storing], found[plain])


def test_what_the_recompute_does_not_come_to_is_not_stored_again():
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), torch.ones(3, WIDTH)
    held, x = [], x.requires_grad_()
    storing = Storing()
    for checkpoint_fn in (plain, storing, storing):
        device = SimulatedDevice()
        with device:
            out = checkpoint_fn(model, x)
            held.append(device.allocated() / x.nbytes)
            out.sum().backward()
    assert [size - held[0] for size in held] == [0, 1, 1]  # one product, and the output, which is the other


def test_another_path_through_the_layer_looks_nothing_up(storing):
    model, x, found = Branches(), torch.ones(3, WIDTH, requires_grad=True), {}
    for count in (2, 2, 3, 1, 2):
        for checkpoint_fn in (plain, storing):
            model.zero_grad()
            checkpoint_fn(model, x, count).sum().backward()
            found[checkpoint_fn] = gradients(model)
        assert_same(found[storing], found[plain])


def test_stored_products_die_with_their_layers_backward(blocks, storing):
    model, x = blocks
    held = []
    for checkpoint_fn in (plain, storing):
        model.zero_grad()
        device = SimulatedDevice()
        with device:
            out = checkpoint_fn(model[0], x)
            held.append(device.allocated())
            out.sum().backward()
            del out
            held.append(device.allocated())
    assert held[2] >= held[0] + 3 * x.nbytes and held[3] < held[1] + 64  # a few flags


def wide_steps(device, checkpoint_fn, steps):
    model, found = LightStack(), []
    for _ in range(steps):
        x = make_input(0, ROWS, WIDTH)
        with device:
            model(x, checkpoint_fn).square().sum().backward()
        found.append([grad.clone() for grad in gradients(model, x)])
        model.zero_grad()
    return found


@pytest.fixture(scope="module")
def sizes():
    peaks = []
    for function in (stock, lambda layer, x, **_: layer(x)):
        device = SimulatedDevice()
        wide_steps(device, function, 1)
        peaks.append(device.highest)
    return peaks


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
def test_the_planner_stores_products_before_it_keeps_layers_and_never_takes_more_than_there_is(share, sizes):
    least, most = sizes
    device = PatientHost(int(least + share * (most - least)))
    ours = planned_on(device)
    expected = wide_steps(SimulatedDevice(), stock, 3)
    for ours_step, stock_step in zip(wide_steps(device, ours, 3), expected, strict=True):
        assert_same(ours_step, stock_step)
    assert not ours.calls["retried"] and ours.forwards == 2
    assert sum(ours.calls.values()) == 2 * DEPTH
    assert not (ours.calls["kept"] and ours.calls["checkpointed"] + ours.calls["offloaded"])
    assert bool(ours.calls["stored"]) == (0 < share < 1.5)
    assert ours.calls["kept"] == 2 * DEPTH or share < 1.5
    assert f"{ours.calls['stored'] // 2} with their products stored" in ours.explain()


def test_no_products_are_stored_where_the_host_has_no_time(sizes):
    device = SimulatedDevice(sum(sizes) // 2)
    device.milliseconds = lambda begin, end: (end - begin) * 1e3  # the device waits for the host
    ours = planned_on(device)
    wide_steps(device, ours, 3)
    assert ours.calls["kept"] and not ours.calls["stored"] and ours.planning.costs.products == ((),) * DEPTH


def test_a_compiled_layer_stores_no_products(monkeypatch):
    ours = planned_on(PatientHost())
    monkeypatch.setattr(measurement_module, "is_compiled", lambda layer: isinstance(layer, Layer))
    wide_steps(ours.planning._gauge, ours, 2)
    assert ours.planning.costs.products == ((),) * DEPTH


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_every_schedule_gives_the_gradients_of_torch_checkpointing(schedule, offload, monkeypatch):
    monkeypatch.setattr(modes_module, "MIN_WIDTH", 1)
    engine, lazy = lazy_engine(monkeypatch)
    ours = planned_on(PatientHost(budget=1), engine)
    choose_storing(monkeypatch, offload)
    assert_as_stock(schedule, functools.partial(ours, offload=offload))
    assert not lazy.corrupted


def choose_storing(monkeypatch, offload):
    """Whatever room there is, every layer's products are stored."""
    from fastft_plugins.checkpointing import planning as planning_module
    from fastft_plugins.checkpointing.planner import Plan

    plan = lambda costs, *_, **__: Plan(0, len(costs.whole), offload)  # noqa: E731
    monkeypatch.setattr(planning_module, "choose", plan)


@pytest.mark.parametrize("fitting", range(DEPTH - 1))
def test_products_without_room_are_given_up(fitting, sizes, monkeypatch):
    device = PatientHost(sum(sizes) // 2)
    ours, forward, calls = planned_on(device), Light.forward, []

    def without_room(layer, x, *args):
        is_stored = any(isinstance(mode, modes_module.Storing) for mode in _get_current_dispatch_mode_stack())
        if is_stored and not ours.calls["retried"] and ours.calls["stored"] == fitting:
            calls.append(layer)
            raise torch.OutOfMemoryError("fragmented")
        return forward(layer, x, *args)

    expected = wide_steps(SimulatedDevice(), stock, 4)
    monkeypatch.setattr(Light, "forward", without_room)
    for ours_step, stock_step in zip(wide_steps(device, ours, 4), expected, strict=True):
        assert_same(ours_step, stock_step)
    assert len(calls) == ours.calls["retried"] == 1


def test_tensors_of_any_dtype_count_by_their_bytes():
    layer = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    with modes_module.CountProducts() as counted:
        layer(torch.ones(2, WIDTH, dtype=torch.bfloat16))
    assert counted.sizes == [2 * WIDTH * 2]
    assert isinstance(layer.weight, Tensor)
