"""The report of a Trainer says what was packed, how much of it, and where the run differs from stock."""

from __future__ import annotations

import pytest
import torch
from hf_helpers import DEFAULTS, Pad, documents, losses, make_trainer, tiny_model
from test_hf_parity import Tokenizer
from transformers import Trainer

from fastft_plugins import FastFTCallback, FastFTError


class WithImage(Pad):
    """A column that packing does not understand, in every batch or in each one after the first ones."""

    def __init__(self, after=0):
        super().__init__()
        self.after, self.calls = after, 0

    def __call__(self, features):
        self.calls += 1
        batch = super().__call__(features)
        return batch if self.calls <= self.after else batch | {"pixel_values": torch.zeros(len(features), 3)}


def train(folder, config=None, **options):
    callback = FastFTCallback(config)
    trainer = make_trainer(folder, tiny_model(), callbacks=[callback], **options)
    trainer.train()
    return trainer, callback.report.features["packing"]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fastft"]


def test_a_run_in_which_nothing_was_packed_is_not_on(tmp_path, caplog):
    _, packing = train(tmp_path, collator=WithImage(), max_steps=6)
    assert not packing.enabled and packing.reason.startswith("no batch was packed: column 'pixel_values'")
    assert packing.metrics == {"unpacked_batches": 6}
    assert any(
        change.startswith("all 6 batches stayed as the collator made them: column") for change in packing.changes
    )
    assert len(messages(caplog)) == 1 and "pixel_values" in messages(caplog)[0]


def test_a_run_in_which_some_batches_were_packed_says_how_many(tmp_path, caplog):
    _, packing = train(tmp_path, collator=WithImage(after=4), max_steps=6)
    assert packing.enabled and packing.metrics["packed_batches"] == 4
    assert any(change.startswith("2 of 6 batches stayed as the collator made them") for change in packing.changes)
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize("config", [{"strict": True, "moe": "off"}, {"packing": "on"}])
@pytest.mark.parametrize("after", [0, 2])
def test_the_first_unpacked_batch_raises_where_packing_must_be_on(tmp_path, config, after):
    callback = FastFTCallback(config)
    trainer = make_trainer(tmp_path, tiny_model(), collator=WithImage(after), callbacks=[callback])
    with pytest.raises(FastFTError, match=r"packing has to leave something out: .*pixel_values"):
        trainer.train()
    assert len(losses(trainer)) == after
    assert callback.report.state == "stopped by FastFTError"
    assert callback.report.features["packing"].enabled == bool(after)


def test_batches_of_evaluation_never_count(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "trainer_options": {"eval_dataset": documents(8)}}
    _, packing = train(tmp_path, {"packing": "on", "strict": True, "moe": "off"}, **options)
    assert packing.metrics["packed_batches"] == 5 and "unpacked_batches" not in packing.metrics


def test_noise_that_depends_on_the_padding_declines(tmp_path):
    stock = make_trainer(tmp_path, tiny_model(), neftune_noise_alpha=5.0)
    stock.train()
    trainer, packing = train(tmp_path, neftune_noise_alpha=5.0)
    assert not packing.enabled and "neftune_noise_alpha" in packing.reason
    assert losses(trainer) == losses(stock)


def test_dropped_labels_change_the_reason(tmp_path):
    _, packing = train(tmp_path, collator=Pad("left"))
    dropped = packing.metrics["dropped_labels"]
    assert dropped > 0 and f"without {dropped:,} first labels of left-padded rows" in packing.reason
    _, packing = train(tmp_path, collator=Pad("right"))
    assert "stay those of the padded run" in packing.reason


def test_a_batch_that_a_loss_of_trl_runs_twice_is_counted_once(tmp_path):
    trl, datasets = pytest.importorskip("trl", minversion="1.15"), pytest.importorskip("datasets")  # 1.14's own fails
    tokenizer, callback = Tokenizer("right"), FastFTCallback({"packing": "on"})
    tokenizer.eos_token = "w2"
    options = {"bf16": False, "gradient_checkpointing": False, "label_smoothing_factor": 0.1}
    trl.SFTTrainer(
        tiny_model("qwen3"),
        trl.SFTConfig(**DEFAULTS, output_dir=str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list(documents()),
        processing_class=tokenizer,
        callbacks=[callback],
    ).train()
    assert callback.report.features["packing"].metrics["packed_batches"] == 5


def test_token_counts_of_the_trainer_are_of_real_tokens(tmp_path):
    """As the README says."""
    options = {"include_num_input_tokens_seen": "all"}
    stock = make_trainer(tmp_path, tiny_model(), **options)
    stock.train()
    trainer, packing = train(tmp_path, **options)
    assert trainer.state.num_input_tokens_seen == packing.metrics["tokens"]
    assert stock.state.num_input_tokens_seen == packing.metrics["tokens"] + packing.metrics["padding_removed"]
    assert trainer.state.total_flos < stock.state.total_flos


def test_dropout_of_lora_draws_other_numbers_and_is_packed_all_the_same(tmp_path):
    """As the README says."""
    peft = pytest.importorskip("peft")
    runs = []
    for callbacks in ([], [FastFTCallback({"packing": "on"})]):
        config = peft.LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.5, init_lora_weights=False)
        model = peft.get_peft_model(tiny_model(), config)
        trainer = make_trainer(tmp_path, model, callbacks=callbacks, max_steps=1)
        trainer.train()
        runs.append(losses(trainer)[0])
    assert runs[0] != pytest.approx(runs[1], rel=1e-4)


class PerSequence(torch.nn.Module):
    """A wrapper with a loss of its own: the mean of each sequence's mean."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits, labels = self.inner(input_ids=input_ids, **kwargs).logits[:, :-1], labels[:, 1:]
        loss_BT = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return {"loss": (loss_BT.sum(1) / (labels != -100).sum(1)).mean()}


def test_a_module_around_the_model_may_have_a_loss_of_its_own(tmp_path):
    callback, model = FastFTCallback(), PerSequence(tiny_model())
    stock = make_trainer(tmp_path, model)
    ours = make_trainer(tmp_path, model, callbacks=[callback])
    stock.train(), ours.train()
    assert "PerSequence" in callback.report.features["packing"].reason and losses(ours) == losses(stock)


def test_a_trainer_that_prepares_inputs_its_own_way_declines(tmp_path):
    class Own(Trainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "labels": inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)}

    callback = FastFTCallback()
    make_trainer(tmp_path, tiny_model(), callbacks=[callback], trainer_class=Own).train()
    assert "_prepare_inputs" in callback.report.features["packing"].reason


def test_activated_lora_declines(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", r=4, alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM")
    callback = FastFTCallback()
    make_trainer(tmp_path, peft.get_peft_model(tiny_model(), config), callbacks=[callback]).train()
    assert "activated LoRA" in callback.report.features["packing"].reason
