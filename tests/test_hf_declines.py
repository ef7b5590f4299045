"""What packing cannot serve exactly stays stock, with the reason: code around the loss, settings, layers."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from family_models import tiny_family
from hf_helpers import Pad, documents, losses, make_trainer, tiny_model
from transformers import Trainer

from fastft_plugins import FastFTCallback, FastFTError, apply
from fastft_plugins.packing import PaddingFreeCollator


def reason_for(target):
    with apply(target) as run:
        pass
    packing = run.report.features["packing"]
    assert not packing.enabled
    return packing.reason


# Code of one's own in the model: a loss per sequence, which a packed row would turn into another one


def mean_per_sequence(output, labels):
    logits, labels = output.logits[:, :-1], labels[:, 1:]
    loss_BT = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    output["loss"] = (loss_BT.sum(1) / (labels != -100).sum(1)).mean()
    return output


def replace_forward(model):
    original = model.forward

    @functools.wraps(original)  # which makes it look like transformers' own
    def forward(*args, labels=None, **kwargs):
        return mean_per_sequence(original(*args, labels=labels, **kwargs), labels)

    model.forward = forward


def replace_by_a_partial(model):
    original = model.forward

    def forward(model, *args, labels=None, **kwargs):
        return mean_per_sequence(original(*args, labels=labels, **kwargs), labels)

    model.forward = functools.update_wrapper(functools.partial(forward, model), original)


def hook_the_forward(model):
    model.register_forward_hook(
        lambda model, args, kwargs, output: mean_per_sequence(output, kwargs["labels"]), with_kwargs=True
    )


class DropsLastColumn:
    def __call__(self, model, args, kwargs):
        return args, kwargs | {name: kwargs[name][:, :-1] for name in ("input_ids", "attention_mask", "labels")}


def hook_the_inputs(model):
    model.register_forward_pre_hook(DropsLastColumn(), with_kwargs=True)


def replace_a_layer(model):
    layer = model.get_base_model().model.layers[1] if hasattr(model, "get_base_model") else model.model.layers[1]
    original = layer.forward
    layer.forward = lambda hidden_BTH, **kwargs: original(hidden_BTH - hidden_BTH.mean(1, keepdim=True), **kwargs)


CHANGES = [replace_forward, replace_by_a_partial, hook_the_forward, hook_the_inputs, replace_a_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_code_of_ones_own_in_the_model_declines_and_stays_stock(tmp_path, change):
    callback = FastFTCallback()
    stock, ours = (make_trainer(tmp_path, tiny_model(), callbacks=each, max_steps=2) for each in ([], [callback]))
    for trainer in (stock, ours):
        change(trainer.model)
        trainer.train()
    packing = callback.report.features["packing"]
    assert not packing.enabled and "test_hf_declines" in packing.reason
    assert losses(ours) == losses(stock)


@pytest.mark.parametrize("change", CHANGES[:-1], ids=lambda change: change.__name__)
def test_code_of_ones_own_around_the_model_declines(tmp_path, change):
    peft = pytest.importorskip("peft")
    trainer = make_trainer(tmp_path, peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"])))
    change(trainer.model)
    assert "PeftModel" in (reason := reason_for(trainer)) and "test_hf_declines" in reason


def test_a_forward_replaced_on_the_class_declines(monkeypatch):
    original = transformers.LlamaForCausalLM.forward
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lambda *args, **kwargs: original(*args, **kwargs))
    assert "the forward of LlamaForCausalLM is replaced by code of test_hf_declines" in reason_for(tiny_model())


@pytest.mark.parametrize("own", [False, True], ids=["accelerate's alone", "one's own inside accelerate's"])
def test_mixed_precision_replaces_the_forward_too(tmp_path, own):
    """accelerate wraps it in autocast and a cast of the outputs, whatever it finds there."""
    callback = FastFTCallback()
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=[callback], bf16=True, max_steps=2)
    if own:
        replace_forward(trainer.model)
    trainer.train()
    assert "forward" in vars(trainer.model)
    assert callback.report.features["packing"].enabled != own


def test_hooks_of_accelerate_change_nothing(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model().train()
    hooks.add_hook_to_module(model, hooks.ModelHook())
    hooks.add_hook_to_module(model.model.layers[0], hooks.ModelHook())
    with apply(model, {"packing": "on"}) as run:
        model(**run.collator(Pad())(documents(4))).loss.backward()
    assert run.report.features["packing"].enabled


def per_sequence(logits, labels, *args, **kwargs):
    loss_BT = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return (loss_BT.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


@pytest.mark.parametrize("how", ["property of the class", "mapping of transformers", "call of the class"])
def test_a_loss_replaced_for_all_models_declines(monkeypatch, how):
    model_class = transformers.LlamaForCausalLM
    if how == "property of the class":
        monkeypatch.setattr(model_class, "loss_function", property(lambda self: per_sequence))
    elif how == "mapping of transformers":
        monkeypatch.setitem(transformers.loss.loss_utils.LOSS_MAPPING, "ForCausalLM", per_sequence)
    else:
        original = torch.nn.Module.__call__
        monkeypatch.setattr(model_class, "__call__", lambda *args, **kwargs: original(*args, **kwargs), raising=False)
    assert "test_hf_declines" in reason_for(tiny_model())


def test_a_method_of_the_trainer_that_is_decorated_declines(tmp_path):
    """A decorator copies the module of what it wraps."""

    @functools.wraps(Trainer.compute_loss)
    def compute_loss(self, model, inputs, **kwargs):
        return per_sequence(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])

    own = type("Own", (Trainer,), {"compute_loss": compute_loss})
    assert "overrides compute_loss" in reason_for(make_trainer(tmp_path, tiny_model(), trainer_class=own))


def test_a_smoother_of_ones_own_declines(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), label_smoothing_factor=0.1)
    trainer.label_smoother = lambda outputs, labels, shift_labels=False: per_sequence(outputs.logits, labels)
    assert "label_smoother was replaced" in reason_for(trainer)


def test_a_loader_that_changes_its_batches_declines(tmp_path):
    class Masks(torch.utils.data.DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                batch["labels"][:, :3] = -100
                yield batch

    class Own(Trainer):
        def get_train_dataloader(self):
            return Masks(self.train_dataset, batch_size=4, collate_fn=Pad())

    callback = FastFTCallback()
    stock, ours = (
        make_trainer(tmp_path, tiny_model(), callbacks=each, trainer_class=Own, max_steps=2)
        for each in ([], [callback])
    )
    stock.train(), ours.train()
    assert "Masks makes its batches by code of test_hf_declines" in callback.report.features["packing"].reason
    assert losses(ours) == losses(stock)


@pytest.mark.parametrize("part", ["mlp", "lm_head"])
def test_a_layer_of_ones_own_declines(part):
    """It may mix tokens, as a convolution does."""

    class Convolution(torch.nn.Module):
        def forward(self, hidden_BTH):
            return hidden_BTH.cumsum(1)

    model = tiny_model()
    setattr(model if part == "lm_head" else model.model.layers[1], part, Convolution())
    assert "Convolution, of test_hf_declines, may look at other tokens" in reason_for(model)


@pytest.mark.parametrize("what", ["function", "mask"])
def test_attention_of_ones_own_declines(monkeypatch, what):
    if what == "function":
        functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        stock = functions["sdpa"]
        monkeypatch.setitem(functions._global_mapping, "sdpa", lambda *args, **kwargs: stock(*args, **kwargs))
    else:
        module = transformers.models.llama.modeling_llama
        stock = module.create_causal_mask
        monkeypatch.setattr(module, "create_causal_mask", lambda *args, **kwargs: stock(*args, **kwargs))
    assert "LlamaAttention attends by code of test_hf_declines" in reason_for(tiny_model())


LATE = [hook_the_forward, replace_forward, replace_a_layer]


@pytest.mark.parametrize("change", LATE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("event", ["on_train_begin", "on_epoch_begin", "on_step_begin"])
def test_code_that_comes_after_the_run_has_begun_is_an_error(tmp_path, change, event):
    late = transformers.TrainerCallback()
    setattr(late, event, lambda args, state, control, model=None, **kwargs: change(model))
    callback = FastFTCallback()
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=[callback, late])
    with pytest.raises(FastFTError, match=r"since training began: .*packing='off'"):
        trainer.train()
    assert trainer.state.global_step == 0 and callback.report.state == "stopped by FastFTError"


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_code_that_comes_on_a_class_in_a_run_is_an_error(monkeypatch, name):
    model, layer = tiny_model().train(), transformers.models.llama.modeling_llama.LlamaDecoderLayer
    with apply(model) as run:
        batch = run.collator(Pad())(documents(4))
        model(**batch)
        original = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *args, **kwargs: original(*args, **kwargs), raising=False)
        with pytest.raises(FastFTError, match="since training began: the forward of LlamaDecoderLayer is replaced"):
            model(**batch)


def test_a_harmless_forward_may_come_in_a_run():
    model = tiny_model().train()
    with apply(model) as run:
        batch = run.collator(Pad())(documents(4))
        model(**batch)
        model.model.layers[1].forward = functools.partial(model.model.layers[1].forward)
        model(**batch), model(**batch)
        replace_a_layer(model)
        with pytest.raises(FastFTError, match="since training began"):
            model(**batch)


@pytest.mark.parametrize("budget", [None, 64])
def test_code_that_comes_in_a_callback_before_ours(tmp_path, budget):
    """In time to decline; not where batches are formed by tokens, for which a run begins before any callback."""
    early = transformers.TrainerCallback()
    early.on_train_begin = lambda args, state, control, model=None, **kwargs: replace_a_layer(model)
    callback = FastFTCallback({"max_tokens_per_batch": budget})
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=[early, callback], max_steps=1)
    if budget is None:
        trainer.train()
        assert "the forward of LlamaDecoderLayer is replaced" in callback.report.features["packing"].reason
    else:
        with pytest.raises(FastFTError, match=r"since training began: the forward of LlamaDecoderLayer is replaced"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_weights_of_attention_cannot_be_had_from_a_packed_row():
    model = tiny_model().train()
    model.set_attn_implementation("eager")
    with apply(model) as run, pytest.raises(FastFTError, match="output_attentions=True"):
        model(**run.collator(Pad())(documents(3)), output_attentions=True)


def test_a_row_that_lost_its_metadata_is_an_error():
    """Stock attention would mix its documents, since models keep a cache by default."""
    model = tiny_model().train()
    with apply(model) as run:
        batch = run.collator(Pad())(documents(3))
        with pytest.raises(FastFTError, match=r"pass all of the batch on, model\(\*\*batch\)"):
            model(input_ids=batch["input_ids"], labels=batch["labels"])
        with pytest.raises(KeyError, match="this packed batch has no 'attention_mask'"):
            batch["attention_mask"]
        model(**Pad()(documents(1)))  # a padded batch of one row is no such row


# Two runs on one model


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_second_run_through_another_root_declines(inner_first):
    model = tiny_model().train()
    roots = [model, torch.nn.Sequential(model)] if inner_first else [torch.nn.Sequential(model), model]
    padded = Pad()(documents(4))
    stock = model(**padded).loss
    with apply(roots[0]) as run:
        with apply(roots[1]) as second:
            assert torch.equal(model(**padded).loss, stock)
        assert "another run" in second.report.features["packing"].reason
        torch.testing.assert_close(model(**run.collator(lambda batch: batch)(padded)).loss, stock)
    assert run.report.features["packing"].metrics["packed_batches"] == 1
    assert torch.equal(model(**padded).loss, stock) and not model.model._forward_pre_hooks


# Settings of the Trainer


LOSS_METHODS = [
    "compute_loss", "training_step", "_prepare_inputs", "_prepare_input", "get_batch_samples",
    "_get_num_items_in_batch",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("trainer"), tiny_model())


@pytest.mark.parametrize("name", LOSS_METHODS)
def test_a_method_that_decides_the_loss_declines_where_it_is_overridden(plain, monkeypatch, name):
    def own(self, *args, **kwargs):
        return getattr(super(type(self), self), name)(*args, **kwargs)

    monkeypatch.setattr(plain, "__class__", type("Own", (Trainer,), {name: own}))
    assert f"overrides {name}: its loss may not be a sum over tokens" in reason_for(plain)


@pytest.mark.parametrize("name", LOSS_METHODS)
def test_a_method_that_decides_the_loss_declines_where_it_is_replaced(plain, monkeypatch, name):
    original = getattr(plain, name)

    @functools.wraps(original)  # which makes it look like transformers' own
    def own(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(plain, name, own)
    assert f"overrides {name}" in reason_for(plain)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("_n_gpu", 2, "DataParallel splits batches by rows"),
        ("torch_compile", True, "torch_compile would compile again"),
    ],
)
def test_settings_that_packing_cannot_serve_decline(plain, monkeypatch, setting, value, reason):
    monkeypatch.setattr(plain.args, setting, value)
    assert reason in reason_for(plain)


def test_prompt_learning_declines():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert "prompt learning" in reason_for(peft.get_peft_model(tiny_model(), config))


# Layers


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "is_causal", False), "is_causal is False in the model's config"),
        (lambda model: setattr(model.model.layers[1].self_attn, "is_causal", False), "are not causal"),
        (lambda model: setattr(model.config, "use_bidirectional_attention", True), "use_bidirectional_attention"),
        (lambda model: setattr(model.config, "use_bidirectional_attention", "all"), "use_bidirectional_attention"),
        (
            lambda model: setattr(model.model.layers[1].self_attn, "attention_dropout", 0.1),
            "attention_dropout of Llama",
        ),
        (
            lambda model: model.model.layers[1].self_attn.add_module("attn_dropout", torch.nn.Dropout(0.1)),
            "attn_dropout of LlamaAttention is 0.1",
        ),
        (
            lambda model: setattr(
                model.config, "rope_parameters", {"full_attention": ROPE, "sliding_attention": DYNAMIC}
            ),
            "'dynamic' rotary embedding",
        ),
    ],
    ids=["config", "layer", "bidirectional", "all", "dropout of a layer", "dropout module of a layer", "rope by layer"],
)
def test_layers_that_packing_cannot_serve_decline(change, reason):
    model = tiny_model()
    change(model)
    assert reason in reason_for(model)


def test_dropout_that_begins_during_a_run_is_an_error():
    """Not before: then the run declines."""
    model = tiny_model().train()
    with apply(model, {"packing": "on"}) as run, pytest.raises(FastFTError, match="calls attention with 'dropout'"):
        model.model.layers[1].self_attn.attention_dropout = 0.1
        model(**run.collator(Pad())(documents(4)))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_padded_evaluation_gets_the_attention_that_the_model_had(family):
    model, batch = tiny_family(family).eval(), Pad()(documents(4))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        stock = model(**batch, output_attentions=True)
        with apply(model, {"packing": "on"}):
            inside = model(**batch, output_attentions=True)
            packed = model(**PaddingFreeCollator(Pad())(documents(4)))
    assert torch.equal(inside.logits, stock.logits) and packed.attentions is None
    assert stock.attentions[0] is not None
    assert all(map(torch.equal, inside.attentions, stock.attentions))
