"""What others do to the experts before a run and in it: compilation, activations, functions, forwards of their own."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from moe_helpers import tiny_causal_lm
from test_moe_hf import (  # noqa: F401  # two are fixtures, one of them for every test here
    ON,
    compare_lora,
    experts_of,
    learn_the_gate,
    looks_like_a_gpu,
    lora_model,
    loss_and_gradients,
    nothing_is_left,
    two_active,
)
from torch import nn
from torch.testing import assert_close
from transformers.integrations.moe import ExpertsInterface

from fastft_hf import experts
from fastft_plugins import FastFTError, apply
from fastft_plugins.moe.gates import gate_of


def compare(model):
    ids = torch.randint(97, (2, 7))
    stock = loss_and_gradients(model, ids)
    with apply(model, ON):
        ours = loss_and_gradients(model, ids)
    assert ours.keys() == stock.keys()
    assert_close(ours, stock, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------ compilation


@pytest.mark.parametrize("by_layer", [False, True])
def test_every_layer_of_a_compiled_model_computes_with_its_own_experts(by_layer):
    model, ids = tiny_causal_lm(dtype=torch.float64), torch.randint(97, (2, 7))
    stock = loss_and_gradients(model, ids)
    torch._dynamo.reset()
    if by_layer:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        model.compile(backend="eager")
    with apply(model, ON):
        ours = loss_and_gradients(model, ids)
    assert_close(ours, stock, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------------------------------------ activations


class Noisy(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x) * torch.rand_like(x)


@pytest.mark.parametrize("act_fn", [nn.Sequential(nn.SiLU(), nn.Dropout(0.5)), nn.RReLU(), Noisy()])
def test_a_random_activation_stays_stock(act_fn):
    model = tiny_causal_lm().eval()
    for module in experts_of(model):
        module.act_fn = act_fn.eval()
    state = torch.get_rng_state()
    with pytest.raises(FastFTError, match="random"):
        apply(model, ON).__enter__()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


def test_a_clip_far_out_is_kept():
    model = tiny_causal_lm(dtype=torch.float64, hidden_act="gelu_10")
    with torch.no_grad():
        for module in experts_of(model):
            module.gate_up_proj.mul_(200)
    compare(model)


class Clipped(nn.Module):
    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        return nn.functional.silu(x).clamp(max=self.most)


def test_an_activation_changed_between_two_forwards_is_the_new_one():
    model, ids = tiny_causal_lm(dtype=torch.float64), torch.randint(97, (2, 7))
    with apply(model, ON):
        loss_and_gradients(model, ids)
        for module in experts_of(model):
            module.act_fn = Clipped(0.1)
        clipped = loss_and_gradients(model, ids)
        for module in experts_of(model):
            module.act_fn.most = 0.01
        more = loss_and_gradients(model, ids)
    assert_close(more, loss_and_gradients(model, ids), rtol=1e-5, atol=1e-7)
    for module in experts_of(model):
        module.act_fn.most = 0.1
    assert_close(clipped, loss_and_gradients(model, ids), rtol=1e-5, atol=1e-7)


def test_a_limit_changed_between_two_runs_is_the_new_one():
    model = tiny_causal_lm("GptOss", torch.float64)
    for limit in (7.0, 0.05):
        for module in experts_of(model):
            module.limit = limit
        compare(model)
        assert {gate_of(module).limit for module in experts_of(model)} == {limit}


# ---------------------------------------------------------------------------------- functions, weights, configs


def test_a_function_of_another_under_stocks_name_is_kept():
    model, name = tiny_causal_lm(), "grouped_mm"
    model.set_experts_implementation(name)
    stock = ExpertsInterface._global_mapping[name]
    ExpertsInterface.register(name, lambda module, *args: stock(module, *args))
    try:
        with pytest.raises(FastFTError, match=f"'{name}' is code of {__name__}"):
            apply(model, ON).__enter__()
    finally:
        ExpertsInterface.register(name, stock)


class Own(torch.Tensor):
    """A weight that may have products of its own."""


def test_a_weight_of_another_class_is_kept():
    model = tiny_causal_lm()
    for module in experts_of(model):
        module.down_proj = nn.Parameter(module.down_proj.data.as_subclass(Own))
    with pytest.raises(FastFTError, match="down_proj is a Own"):
        apply(model, ON).__enter__()


def test_an_implementation_set_in_a_run_is_obeyed_with_a_warning(caplog):
    experts._warn_of_another.cache_clear()
    model, ids, calls = tiny_causal_lm(dtype=torch.float64), torch.randint(97, (2, 7)), []
    stock = loss_and_gradients(model, ids)
    eager = ExpertsInterface._global_mapping["batched_mm"]
    ExpertsInterface.register("mine", lambda *args: calls.append(1) or eager(*args))
    try:
        with caplog.at_level(logging.WARNING, logger="fastft"), apply(model, ON):
            model.config._experts_implementation_internal = "mine"
            assert_close(loss_and_gradients(model, ids), stock, rtol=1e-5, atol=1e-7)
    finally:
        del ExpertsInterface._global_mapping["mine"]
    assert len(calls) == 2
    assert [record.message for record in caplog.records if "became 'mine'" in record.message]


def test_what_is_set_in_the_config_of_the_experts_stays():
    model = tiny_causal_lm()
    with apply(model, ON):
        config = experts_of(model)[0].config
        config.note = "mine"
        copied = copy.copy(config)
        copied.note = "the copy's"
    assert model.config.note == "mine"


# ------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("where", ["experts", "wrapper", "everywhere"])
def test_lora_with_somebody_elses_forward_or_hook_is_pefts(where, monkeypatch):
    adapted = lora_model(dtype=torch.float64)
    handle = None
    if where == "everywhere":
        inside = set(experts_of(adapted))
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: 2 * out if module in inside else None
        )
    else:
        for name, module in adapted.named_modules():
            if (module in experts_of(adapted)) if where == "experts" else name.endswith("mlp.experts"):
                forward = module.forward
                module.forward = lambda *args, forward=forward, **kwargs: 2 * forward(*args, **kwargs)
    try:
        compare_lora(adapted, monkeypatch, merges=True)
    finally:
        if handle is not None:
            handle.remove()


def test_the_report_names_the_lora_that_is_pefts_own():
    adapted = lora_model(adapters=2)
    two_active(adapted)
    with apply(adapted, ON) as run:
        pass
    assert any("2 layers is PEFT's own" in change for change in run.report.features["moe"].changes)


# ------------------------------------------------------------------------------------------------ what it says


def test_without_a_gpu_the_report_says_what_there_is_to_serve():
    with apply(tiny_causal_lm(), {"packing": "off"}) as run:
        assert "experts function in 2 layers" in run.report.features["moe"].reason
    model = tiny_causal_lm()
    for module in experts_of(model):
        learn_the_gate(module)
    with apply(model, {"packing": "off", "strict": True}) as run:
        assert "act_fn.slope" in run.report.features["moe"].reason


def test_an_error_under_strict_names_the_remedy(looks_like_a_gpu):  # noqa: F811
    model = tiny_causal_lm()
    for module in experts_of(model):
        learn_the_gate(module)
    with pytest.raises(FastFTError, match=r"act_fn.slope.*Remedy: strict=False"):
        apply(model, {"packing": "off", "strict": True}).__enter__()


def test_the_report_holds_the_balance_of_the_experts_and_no_kernels_of_another_run():
    model, ids = tiny_causal_lm(), torch.randint(97, (2, 7))
    with apply(model, ON) as run:
        loss_and_gradients(model, ids)
    moe = run.report.features["moe"]
    assert 1 <= moe.metrics["expert_imbalance"] <= 4 and "expert_imbalance" in str(run.report)
    assert any("kernel" in change for change in moe.changes)
    with apply(model, ON) as run:
        pass
    assert not any("kernel" in change for change in run.report.features["moe"].changes)


def test_a_function_of_another_under_our_name_is_kept():
    mine = lambda *args: None  # noqa: E731
    ExpertsInterface.register("fastft", mine)
    try:
        with pytest.raises(FastFTError, match="registered as experts implementation 'fastft'"):
            apply(tiny_causal_lm(), ON).__enter__()
        assert ExpertsInterface._global_mapping["fastft"] is mine
    finally:
        del ExpertsInterface._global_mapping["fastft"]
