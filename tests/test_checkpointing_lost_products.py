"""Products that cannot be looked up: they are computed again, and take no memory meanwhile."""

from __future__ import annotations

import functools

import pytest
import torch
from checkpointing_helpers import assert_same, gradients, lazy_engine
from simulated_device import SimulatedDevice
from test_checkpointing_products import WIDTH, Block, Branches, Copying, CountOperations, plain, storing
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.two_tensor import TwoTensor

from fastft_plugins.checkpointing import product_modes as modes_module
from fastft_plugins.checkpointing import products as products_module
from fastft_plugins.checkpointing.handle import Handle
from fastft_plugins.checkpointing.products import LayerProducts

__all__ = ["storing"]  # a fixture
ROWS = 16
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Leaking(nn.Module):
    """Whoever calls it gets hold of a product that the backward needs: one of two outputs, and an attribute."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(2))

    def forward(self, x):
        self.seen = product = self.first(x)
        return self.last(product.sin() * product).sin(), product


def of_output(layer, output):
    output.detach().mul_(3)


def of_output_without_a_trace(layer, output):
    output.data.mul_(3)


def of_what_a_hook_has_seen(layer, output):
    layer.seen.detach().mul_(3)


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (2, ROWS, WIDTH)], ids=["rows", "batch"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("change", [of_output, of_output_without_a_trace, of_what_a_hook_has_seen])
def test_changes_outside_of_the_layer_leave_the_gradients_alone(change, bias, shape, storing):
    layer, found = Leaking(bias), {}
    for step in range(4):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)).requires_grad_()
        for checkpoint_fn in (plain, storing):
            layer.zero_grad()
            x.grad = None
            out, product = checkpoint_fn(layer, x)
            if step > 1:  # what has been checked is not known to be changed
                change(layer, product)
            out.sum().backward()
            found[checkpoint_fn] = gradients(layer, x)
        assert_same(found[storing], found[plain])


def test_a_change_that_only_the_version_tells_of(storing):
    """As a kernel's own function that says so, and changes nothing when it is checked."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            x.detach().numpy()[...] *= factor
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    layer, found = Leaking(bias=True), {}

    def function(x):
        return layer.last(Scale.apply(layer.first(x)).tanh()).sin()

    for step in range(4):
        factor = 1.0 if step < 2 else 3.0
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step)).requires_grad_()
        for checkpoint_fn in (plain, storing):
            layer.zero_grad()
            x.grad = None
            checkpoint_fn(function, x).sum().backward()
            found[checkpoint_fn] = gradients(layer, x)
        assert_same(found[storing], found[plain])


def test_products_of_another_kind_of_tensor_are_computed_again(storing):
    layer = Leaking()

    def function(x):
        weight = TwoTensor(layer.first.weight, layer.last.weight)
        return (x @ weight.t()).sin()

    for _ in range(3):
        x = torch.ones(ROWS, WIDTH, requires_grad=True)
        found = [torch.autograd.grad(each(function, x).sum(), [x])[0] for each in (plain, storing)]
        assert torch.equal(found[0].a, found[1].a) and torch.equal(found[0].b, found[1].b)


# Nothing is held for nothing


class CopyingAlone(Copying):
    """Keeps nothing on the device."""

    def __call__(self, layer, *args, **kwargs):
        products = self.layers.setdefault(layer, LayerProducts())
        contexts = functools.partial(
            products.contexts, offloaded=frozenset(range(99)), stores_others=not products.is_known
        )
        return self.engine(layer, *args, contexts=contexts, **kwargs)


@pytest.fixture
def handles(monkeypatch):
    """Of all calls that have offloaded."""
    made, found = Handle.__init__, []

    def remember(handle, *args):
        made(handle, *args)
        found.append(handle)

    monkeypatch.setattr(Handle, "__init__", remember)
    return found


@pytest.fixture
def copying(monkeypatch):
    monkeypatch.setattr(products_module, "MIN_BYTES", 1)
    engine, lazy = lazy_engine(monkeypatch)
    yield CopyingAlone(engine)
    lazy.drain()
    assert not lazy.corrupted


def test_where_a_part_of_a_product_has_no_room_none_of_it_waits_in_host_memory(copying, handles, monkeypatch):
    def attention(x):
        q = x.unflatten(-1, (4, -1)).transpose(-2, -3)
        return scaled_dot_product_attention(q, q, q, is_causal=True).sin()

    monkeypatch.setattr(modes_module, "_ATTENTION", {CPU_ATTENTION})
    monkeypatch.setattr(modes_module, "_DROPOUT", {CPU_ATTENTION: 3})
    offload, x = Handle.offload_product, torch.randn(2, ROWS, WIDTH, requires_grad=True)
    copying(attention, x).sum().backward()
    copying(attention, x)
    assert len(handles[-1].products) == 2  # what it returns, and its sums
    monkeypatch.setattr(
        Handle, "offload_product", lambda handle, product: offload(handle, product) if product.dim() == 4 else None
    )
    out = copying(attention, x)
    assert not handles[-1].products
    out.sum().backward()


def test_what_no_recompute_will_ask_for_goes_at_once(copying, handles):
    model, x = Branches(), torch.ones(ROWS, WIDTH, requires_grad=True)
    copying(model, x, 2).sum().backward()
    copying(model, x, 2)
    assert len(handles[-1].products) == 2
    copying(model, x, 3)  # another path than the one that was checked
    assert not handles[-1].products


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_graph_holds_no_products_once_its_layers_have_run_again(is_kept, storing):
    layer, x, held = Block(), torch.randn(2, ROWS, WIDTH, requires_grad=True), []
    for _ in range(2):
        storing(layer, x).sum().backward()
    for checkpoint_fn in (plain, storing):
        device = SimulatedDevice()
        with device:
            loss = checkpoint_fn(layer, x).sum()
            loss.backward(retain_graph=is_kept)
            held.append(device.allocated())
    assert held[1] <= held[0]


def test_a_kept_graph_holds_no_host_memory_but_for_the_input(copying):
    layer, x = Block(), torch.randn(2, ROWS, WIDTH, requires_grad=True)
    for runs in (1, 1, 2):
        loss = copying(layer, x).sum()
        for _ in range(runs):
            loss.backward(retain_graph=True)
        pool = copying.engine._lanes[x.device].pool
        pool._collect()
        free = sum(map(torch.Tensor.numel, pool._free))
    assert pool.allocated - free < 2 * x.nbytes


def test_what_is_too_small_to_be_copied_is_computed_again_where_nothing_is_to_stay_on_the_device(copying, monkeypatch):
    layer, x, products = Block(), torch.randn(2, ROWS, WIDTH, requires_grad=True), []
    copying(layer, x).sum().backward()
    for least in (1, x.nbytes, x.nbytes + 1):
        monkeypatch.setattr(products_module, "MIN_BYTES", least)
        with CountOperations() as counted:
            copying(layer, x).sum().backward()
        products.append(counted.calls[torch.ops.aten.addmm.default])
    assert [count - products[0] for count in products] == [0, 1, 4]  # the narrow one, then q, k and v
