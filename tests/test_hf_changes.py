"""Settings that stock reads at each batch, packed attention not: before a run they decline, in it they raise."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from family_models import tiny_family
from hf_helpers import Pad, documents, make_trainer, tiny_model
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastft_plugins import FastFTCallback, FastFTError, apply


def attentions_of(model):
    return [layer.self_attn for layer in model.model.layers]


def batch_of(run):
    return run.collator(Pad())(documents(6))


def fails_late(model, change, reason):
    with apply(model.train(), {"packing": "on"}) as run:
        batch = batch_of(run)
        model(**batch).loss.backward()
        change(model)
        with pytest.raises(FastFTError, match=f"since training began: .*{reason}"):
            model(**batch)


def widen(model):
    model.config.sliding_window = 64


def make_full(model):
    model.config.layer_types = ["full_attention"] * 3


def make_full_in_place(model):
    model.config.layer_types[1] = "full_attention"


def narrow_a_layer(model):
    attentions_of(model)[1].sliding_window = 2


WINDOWS = [widen, make_full, make_full_in_place, narrow_a_layer]
WINDOWED = ["gemma2", "gemma3_text", "gpt_oss", "qwen2", "qwen3", "olmo3", "cohere2", "exaone4"]


@pytest.mark.parametrize("change", WINDOWS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", WINDOWED)
def test_windows_that_are_not_those_of_stocks_masks(family, change):
    model = tiny_family(family)
    fails_late(copy.deepcopy(model), change, "has a window of")
    change(model)
    with apply(model) as run:
        pass
    assert "has a window of" in run.report.features["packing"].reason


def test_windows_that_layers_look_up_at_each_call_may_change():
    model, padded = tiny_model("mistral").train(), Pad()(documents(6))
    with apply(model, {"packing": "on"}) as run:
        model(**batch_of(run))
        model.config.sliding_window = 3
        packed = model(**batch_of(run)).loss
    torch.testing.assert_close(packed, model(**padded).loss)


@pytest.mark.parametrize("name", ["is_causal", "use_bidirectional_attention"])
def test_attention_that_is_no_longer_causal(name):
    fails_late(tiny_model(), lambda model: setattr(model.config, name, name != "is_causal"), name)


@pytest.fixture
def functions():
    """transformers' registry, with which a test may do as it likes."""
    before = dict(AttentionInterface._global_mapping)
    yield AttentionInterface
    AttentionInterface._global_mapping.clear()
    AttentionInterface._global_mapping.update(before)


def mine(module, query, *args, **kwargs):
    return ALL_ATTENTION_FUNCTIONS["flex_attention"](module, query * 0.5, *args, **kwargs)


def test_an_attention_function_registered_late(functions):
    fails_late(tiny_model(), lambda model: functions.register("sdpa", mine), "attends by code of test_hf_changes")


def test_an_attention_function_chosen_late(functions):
    functions.register("mine", mine)
    fails_late(tiny_model(), lambda model: model.set_attn_implementation("mine"), "attention implementation 'mine'")


@pytest.mark.parametrize("name", ["eager_attention_forward", "create_causal_mask"])
def test_functions_beside_the_model_replaced_late(monkeypatch, name):
    module = transformers.models.llama.modeling_llama
    model = tiny_model()
    model.set_attn_implementation("eager")
    fails_late(model, lambda model: monkeypatch.setattr(module, name, mine), "attends by code of test_hf_changes")


def test_a_mask_that_did_not_come_from_the_batch():
    def give_a_mask(layer, args, kwargs):
        return args, kwargs | {"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)}

    model = tiny_model().train()
    model.model.layers[1].register_forward_pre_hook(give_a_mask, with_kwargs=True)
    with apply(model) as run, pytest.raises(FastFTError, match="got a mask that did not come from its batch"):
        model(**batch_of(run))


def test_a_layer_that_gets_another_config():
    def change(model):
        attentions_of(model)[1].config = copy.deepcopy(model.config)

    fails_late(tiny_model(), change, "LlamaAttention got another config")


# Softcaps, which sdpa refuses from transformers 5.24 on


def test_a_softcap_with_sdpa_is_what_the_installed_version_makes_of_it():
    model, padded = tiny_family("gemma2").train(), Pad()(documents(6))
    model.config._attn_implementation_internal = "sdpa"
    try:
        stock = model(**padded).loss
    except ValueError:
        with apply(model) as run:
            pass
        assert "Gemma2Attention has a softcap, which stock's 'sdpa' refuses" in run.report.features["packing"].reason
        return
    with apply(model, {"packing": "on"}) as run:
        torch.testing.assert_close(model(**batch_of(run)).loss, stock)


# Batches that come again


def test_a_batch_that_comes_again_gets_the_function_of_that_moment(functions):
    """Of eager, packed attention takes the softcap; of transformers' flex_attention, the function itself."""
    calls = []

    class Flex:
        __wrapped__ = staticmethod(ALL_ATTENTION_FUNCTIONS["flex_attention"])
        __module__ = "transformers.integrations.flex_attention"

        def __call__(self, module, query, *args, **kwargs):
            calls.append(module)
            return query.transpose(1, 2), None

    Flex.__globals__ = {"__name__": Flex.__module__}
    functions.register("flex_attention", Flex())
    model = tiny_family("gemma2").train()
    model.config._attn_implementation_internal = "eager"
    with apply(model, {"packing": "on"}) as run:
        batch = batch_of(run)
        model(**batch)
        assert not calls
        model.config._attn_implementation_internal = "flex_attention"
        model(**batch)
        assert len(calls) == 3


# Parts of the model, and what is around it


class Own(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def wrap_a_layer(model):
    model.model.layers[0] = Own(model.model.layers[0])


def wrap_an_mlp(model):
    model.model.layers[0].mlp = Own(model.model.layers[0].mlp)


def replace_the_layers(model):
    model.model.layers = torch.nn.ModuleList(map(Own, model.model.layers))


@pytest.mark.parametrize("change", [wrap_a_layer, wrap_an_mlp, replace_the_layers], ids=lambda change: change.__name__)
def test_parts_of_ones_own_that_come_late(change):
    fails_late(tiny_model(), change, "Own, of test_hf_changes, may look at other tokens")


def subclass_a_layer(model):
    class Layer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
        def forward(self, hidden_BTH, *args, **kwargs):
            return super().forward(hidden_BTH.cumsum(1), *args, **kwargs)

    Layer.__module__ = "transformers"
    old = model.model.layers[0]
    model.model.layers[0] = layer = Layer(model.config, 0).train()
    layer.self_attn = old.self_attn


def test_a_new_layer_with_a_forward_of_ones_own():
    fails_late(tiny_model(), subclass_a_layer, "the forward of Layer is replaced by code of test_hf_changes")


def test_a_new_layer_of_attention():
    def change(model):
        model.model.layers[0] = type(model.model.layers[0])(model.config, 0).train()

    fails_late(tiny_model(), change, "attention layers of LlamaForCausalLM were replaced")


def test_adapters_may_come_in_a_run_and_what_comes_after_them_is_noticed():
    peft = pytest.importorskip("peft")
    model, padded = tiny_model().train(), Pad()(documents(6))
    with apply(model, {"packing": "on"}) as run:
        model(**batch_of(run))
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        packed = model(**batch_of(run)).loss
        wrap_an_mlp(model)
        with pytest.raises(FastFTError, match="since training began: Own, of test_hf_changes"):
            model(**batch_of(run))
    torch.testing.assert_close(packed, model(**padded).loss)


def skip_labels(module, args, kwargs):
    return args, kwargs | {"labels": kwargs["labels"][:, :3]}


AROUND = {
    "forward hook": lambda model: model.register_forward_hook(lambda module, args, output: output),
    "forward pre-hook": lambda model: model.register_forward_pre_hook(skip_labels, with_kwargs=True),
    "forward": lambda model: setattr(model, "forward", Own(model.forward).forward),
    "hook on the tuner": lambda model: model.base_model.register_forward_hook(lambda module, args, output: output),
}


@pytest.mark.parametrize("name", AROUND)
def test_code_around_the_model_that_comes_late(tmp_path, name):
    peft = pytest.importorskip("peft")
    late, callback = transformers.TrainerCallback(), FastFTCallback()

    def change(args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            AROUND[name](model)

    late.on_step_begin = change
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = make_trainer(tmp_path, model, callbacks=[callback, late], max_steps=3)
    with pytest.raises(FastFTError, match=r"since training began: .*test_hf_changes"):
        trainer.train()
    assert trainer.state.global_step == 1
