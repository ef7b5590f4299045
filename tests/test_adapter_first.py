"""LoRA on checkpointed layers: the same gradients bit by bit, without each layer's last base product computed again."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from hf_helpers import tiny_model
from lazy_transfer import LazyTransfer
from test_checkpointing_hf import ONLY, lazy, room  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.shapes import enable_checkpointing
from fastft_hf.adapter_first import AdaptersFirst
from fastft_plugins import apply

peft = pytest.importorskip("peft")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class CountProducts(TorchDispatchMode):
    """Products with one matrix, of which only its address is known: views of it count."""

    def __init__(self, weights):
        super().__init__()
        self.addresses, self.count = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.count += any(each.data_ptr() in self.addresses for each in args)
        return func(*args, **(kwargs or {}))


def lora_model(targets=ALL, dtype=torch.float32, adapters=1, **options):
    model = tiny_model(attention_dropout=0.1, attn_implementation="eager").to(dtype)
    config = {"r": 4, "target_modules": list(targets), "lora_dropout": 0.1} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    for number in range(1, adapters):
        model.add_adapter(f"adapter{number}", peft.LoraConfig(**config))
    if adapters > 1:
        model.base_model.set_adapter(["default", *(f"adapter{number}" for number in range(1, adapters))])
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    enable_checkpointing(model)
    model.enable_input_require_grads()
    return model.train()


def last_weights(model, name="down_proj"):
    return [module.base_layer.weight for path, module in model.named_modules() if path.endswith(name)]


def step(model, **changes):
    torch.manual_seed(0)
    model.zero_grad()
    ids = torch.randint(1, 97, (2, 9))
    with CountProducts(last_weights(model)) as counted:
        loss = model(input_ids=ids, labels=ids).loss
        forward = counted.count
        loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"loss": loss.detach()}, (forward, counted.count - forward)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and len(theirs) > 2
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def changes_of(run):
    return "; ".join(run.report.features["checkpointing"].changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_gradients_without_the_last_base_product(lazy, dtype):  # noqa: F811
    model = lora_model(dtype=dtype)
    depth = model.config.num_hidden_layers
    expected, counts = step(model)
    assert counts == (depth, 2 * depth)  # once in the recompute, once for the gradient of the input
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with apply(model, ONLY) as run:
        assert "LoRA's last adapter of a layer runs before its base product" in changes_of(run)
        for number in range(3):
            got, counts = step(model)
            assert_equal(got, expected)
            assert counts == (depth, (2 if number == 0 else 1) * depth)
    after = {name: vars(module) for name, module in model.named_modules()}
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        assert not after[name]["_forward_pre_hooks"] or attributes["_forward_pre_hooks"], name


@pytest.mark.parametrize(
    ("options", "is_reordered"),
    [
        ({"targets": ["q_proj"]}, False),  # its input is also that of others
        ({"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}, False),  # the last product is not LoRA's
        ({"targets": ["down_proj"]}, True),
        ({"adapters": 2}, False),
        ({"use_dora": True}, False),
    ],
    ids=["one of three", "not the last", "only the last", "two adapters", "DoRA"],
)
def test_other_adapters_compute_as_peft_does(lazy, options, is_reordered):  # noqa: F811
    model = lora_model(**options)
    depth = model.config.num_hidden_layers
    name = "down_proj" if "down_proj" in options.get("targets", ALL) else None
    expected, stock_counts = step(model) if name else step_uncounted(model)
    with apply(model, ONLY):
        for _ in range(3):
            got, counts = step(model) if name else step_uncounted(model)
            assert_equal(got, expected)
    if name:
        assert counts[1] == stock_counts[1] - depth * is_reordered


def step_uncounted(model):
    torch.manual_seed(0)
    model.zero_grad()
    ids = torch.randint(1, 97, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}, None


def test_a_graph_that_outlives_the_block_keeps_its_order(lazy):  # noqa: F811
    model = lora_model()
    expected, _ = step(model)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with apply(model, ONLY):
        step(model)
        torch.manual_seed(0)
        model.zero_grad()
        ids = torch.randint(1, 97, (2, 9))
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name


def test_adapters_switched_off_and_merged_in_between(lazy):  # noqa: F811
    model = lora_model(lora_dropout=0.0)
    ids = torch.randint(1, 97, (2, 9))
    model.eval()
    expected = model(input_ids=ids).logits
    with model.disable_adapter():
        expected_off = model(input_ids=ids).logits
    model.train()
    with apply(model, ONLY):
        step(model), step(model)
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, expected_off)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        model.unmerge_adapter()


def test_an_exception_in_a_layer_leaves_nothing_behind(lazy, monkeypatch):  # noqa: F811
    model = lora_model()
    linear = next(module for name, module in model.named_modules() if name.endswith("down_proj"))
    with apply(model, ONLY):
        step(model)
        monkeypatch.setattr(linear.lora_B["default"], "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model)
        assert "forward" not in vars(linear)
        monkeypatch.undo()
        step(model)


def test_copies_of_the_model_are_stock(lazy):  # noqa: F811
    model = lora_model()
    expected, _ = step(model)
    with apply(model, ONLY):
        step(model)
        copied = copy.deepcopy(model)
        layer = copied.base_model.model.model.layers[0]
        assert isinstance(pickle.loads(pickle.dumps(layer._gradient_checkpointing_func)), functools.partial)
    got, _ = step(copied)
    assert_equal(got, expected)
    assert isinstance(lazy, LazyTransfer)


def test_an_input_that_something_else_uses_keeps_its_order():
    """Three gradients would be added up in another order."""

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)

        def forward(self, x):
            hidden = torch.nn.functional.silu(self.up(x))
            return self.down(hidden) * torch.sigmoid(hidden) + hidden

    def gradients_of(checkpoint_fn):
        torch.manual_seed(3)
        model.zero_grad()
        out = torch.randn(16, 64)
        for layer in model.base_model.model:
            out = checkpoint_fn(layer, out, use_reentrant=False)
        out.square().sum().backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    config = peft.LoraConfig(r=8, target_modules=["up", "down"])
    model = peft.get_peft_model(torch.nn.Sequential(*(Gated() for _ in range(3))), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = {name: grad.clone() for name, grad in gradients_of(checkpoint).items()}
    ours = AdaptersFirst(checkpoint)
    for _ in range(3):
        assert_equal(gradients_of(ours), expected)
