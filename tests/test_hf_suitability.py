"""When packing declines: each reason by name, with a loss or a model that packing would get wrong."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
import transformers
from hf_helpers import Pad, documents, losses, make_trainer, tiny_model
from transformers import Trainer

from fastft_plugins import FastFTCallback, FastFTError, apply
from fastft_plugins.packing import PaddingFreeCollator
from fastft_plugins.run import active_run


def packing_of(model):
    with apply(model) as run:
        return run.report.features["packing"]


def mean_of_rows(model):
    """A forward whose loss is a mean of each sequence's mean: on a packed row it would be another number."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args, labels=None, **kwargs):
        output = original(*args, **kwargs)
        rows = [
            torch.nn.functional.cross_entropy(row[:-1], label[1:])
            for row, label in zip(output.logits, labels, strict=True)
        ]
        output.loss = torch.stack(rows).mean()
        return output

    return forward


class Doubled:
    """A forward hook that changes the loss."""

    def __call__(self, module, args, output):
        output.loss = output.loss * 2
        return output


class Quiet:
    """A pre-hook that changes nothing."""

    def __call__(self, module, args):
        return None


@pytest.mark.parametrize("change", ["forward", "hook"])
def test_a_model_whose_loss_somebody_changed_trains_stock(tmp_path, change):
    callback = FastFTCallback()
    trainers = [make_trainer(tmp_path, tiny_model(), callbacks=extra) for extra in ([], [callback])]
    for trainer in trainers:
        if change == "forward":
            trainer.model.forward = mean_of_rows(trainer.model)
        else:
            trainer.model.register_forward_hook(Doubled())
        trainer.train()
    stock, ours = trainers
    assert losses(ours) == losses(stock)
    packing = callback.report.features["packing"]
    assert not packing.enabled
    expected = (
        "the forward of LlamaForCausalLM was replaced" if change == "forward" else "forward hook Doubled of Llama"
    )
    assert expected in packing.reason


def test_pre_hooks_and_accelerates_own_forward_are_no_reason(tmp_path):
    callback = FastFTCallback({"packing": "on"})
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=[callback], bf16=True, max_steps=2)
    trainer.model.register_forward_pre_hook(Quiet())
    trainer.train()
    assert callback.report.features["packing"].metrics["packed_batches"] == 2


def test_a_dropout_that_only_the_modules_know_declines():
    model = tiny_model()
    model.model.layers[1].self_attn.attention_dropout = 0.25
    assert "LlamaAttention has a dropout of 0.25" in packing_of(model).reason


def test_a_dropout_switched_on_during_the_run_is_an_error_not_a_wrong_number():
    model = tiny_model().train()
    row = PaddingFreeCollator(Pad())(documents(3))
    with apply(model):
        model.model.layers[1].self_attn.attention_dropout = 0.25
        with pytest.raises(FastFTError, match=r"LlamaAttention calls attention with 'dropout'.*packing='off'"):
            model(**row)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "is_causal", False), "is_causal is False in the model's config"),
        (lambda model: setattr(model.model.layers[0].self_attn, "is_causal", False), "LlamaForCausalLM are not causal"),
        (lambda model: setattr(model.config, "use_bidirectional_attention", True), "use_bidirectional_attention"),
        (lambda model: setattr(model.config, "rope_parameters", PER_KIND), "'dynamic' rotary embedding"),
    ],
)
def test_a_model_that_is_not_plainly_causal_declines(change, reason):
    model = tiny_model()
    change(model)
    packing = packing_of(model)
    assert not packing.enabled and reason in packing.reason


PER_KIND = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic"}}


def test_prompt_learning_declines():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert "prompt learning" in packing_of(peft.get_peft_model(tiny_model(), config)).reason


@pytest.mark.parametrize(
    ("options", "attribute", "reason"),
    [({}, ("_n_gpu", 2), "DataParallel"), ({}, ("torch_compile", True), "torch_compile")],
)
def test_arguments_of_the_trainer_that_decline(tmp_path, options, attribute, reason):
    trainer = make_trainer(tmp_path, tiny_model(), **options)
    setattr(trainer.args, *attribute)
    packing = packing_of(trainer)
    assert not packing.enabled and reason in packing.reason


@pytest.mark.parametrize(
    "method", ["compute_loss", "training_step", "_prepare_inputs", "get_batch_samples", "_get_num_items_in_batch"]
)
def test_every_method_that_decides_the_loss_counts(tmp_path, method):
    def overridden(self, *args, **kwargs):
        return getattr(super(Theirs, self), method)(*args, **kwargs)

    Theirs = type("Theirs", (Trainer,), {method: overridden})
    packing = packing_of(make_trainer(tmp_path, tiny_model(), trainer_class=Theirs))
    assert not packing.enabled and f"overrides {method}" in packing.reason


def test_a_block_on_a_part_of_a_model_joins_the_run_on_the_whole():
    peft = pytest.importorskip("peft")
    base = tiny_model()
    whole = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", r=4))
    batch = Pad()(documents(4))
    for outer, inner in ((whole, base), (base, whole)):
        with apply(outer, {"packing": "on"}) as run, apply(inner) as joined:
            assert joined is run
            whole(**run.collator(lambda rows: rows)(batch)).loss.backward()
        assert run.report.features["packing"].metrics["packed_batches"] == 1


def test_a_config_that_is_not_obeyed_is_warned_of(tmp_path, caplog):
    first, second = FastFTCallback({"moe": "off"}), FastFTCallback({"packing": "off"})
    with caplog.at_level(logging.WARNING, logger="fastft"):
        make_trainer(tmp_path, tiny_model(), callbacks=[first, second], max_steps=1).train()
    assert second.report is first.report and first.report.features["packing"].enabled
    (note,) = first.report.notes
    assert "not obeyed" in note and "packing='off'" in note and note in caplog.text


def test_one_callback_in_two_trainers_at_once_is_warned_of(tmp_path, caplog):
    callback, inner = FastFTCallback(), []

    class TrainsAnother(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not inner:
                inner.append(make_trainer(tmp_path, tiny_model(), callbacks=[callback], max_steps=1))
                inner[0].train()

    stock = make_trainer(tmp_path, tiny_model())
    ours = make_trainer(tmp_path, tiny_model(), callbacks=[callback, TrainsAnother()])
    with caplog.at_level(logging.WARNING, logger="fastft"):
        for trainer in (stock, ours):
            trainer.train()
    assert "ends in one Trainer and begins in another" in caplog.text
    assert active_run(ours.model) is None and not ours.model.model._forward_pre_hooks
    torch.testing.assert_close(losses(ours), losses(stock), rtol=2e-6, atol=2e-6)


def test_a_batch_whose_only_labels_would_be_dropped_stays_padded():
    """Left padding, one label a document, and that its first token's: packed, the loss would be 0 / 0."""
    batch = Pad("left")([{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}])
    batch["labels"] = torch.tensor([[-100] * 4, [-100, -100, 9, -100]])
    row = PaddingFreeCollator(lambda rows: rows)(batch)
    model = tiny_model().train()
    with apply(model):
        loss = model(**row).loss
    assert "only labels are first labels behind padding" in row["fastft_metadata"].reason
    assert torch.equal(loss, model(**batch).loss) and torch.isfinite(loss)


def test_the_collators_own_labels_are_not_written_to():
    rows = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "position_ids": torch.tensor([[0, 1], [0, 1]])}
    for batch in (rows | {"labels": rows["input_ids"].clone()}, Pad()(documents(3))):
        before = batch["labels"].clone()
        PaddingFreeCollator(lambda given: given)(batch)
        assert torch.equal(batch["labels"], before)


def test_a_padded_batch_gets_the_models_own_attention():
    """Stock's eager and sdpa differ in rounding: what is not packed must not change from one to the other."""
    for implementation in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        calls = []
        module = transformers.models.llama.modeling_llama
        eager = module.eager_attention_forward
        module.eager_attention_forward = lambda *args, eager=eager, calls=calls, **kwargs: (
            calls.append(1),
            eager(*args, **kwargs),
        )[1]
        try:
            with apply(model):
                model(**Pad()(documents(2)))
        finally:
            module.eager_attention_forward = eager
        assert bool(calls) == (implementation == "eager")
