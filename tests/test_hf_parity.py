"""Training with the callback is stock training: loss, every gradient, grad norm and weights, on the CPU in fp32."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_helpers import (
    DEFAULTS,
    FAMILIES,
    VOCABULARY,
    Gradients,
    Pad,
    documents,
    grad_norms,
    losses,
    make_trainer,
    tiny_model,
)
from torch.testing import assert_close

from fastft_plugins import FastFTCallback, apply
from fastft_plugins.packing import PaddingFreeCollator


def compare(tmp_path, model, **options):
    """Train twice from ``model`` and hold the run with the callback to the stock one. Returns the report."""
    stock_gradients, gradients, callback = Gradients(), Gradients(), FastFTCallback({"packing": "on"})
    stock = make_trainer(tmp_path, model, callbacks=[stock_gradients], **options)
    stock.train()
    ours = make_trainer(tmp_path, model, callbacks=[callback, gradients], **options)
    ours.train()
    assert len(losses(stock)) == stock.args.max_steps
    assert_close(losses(ours), losses(stock), rtol=2e-6, atol=2e-6)
    assert_close(grad_norms(ours), grad_norms(stock), rtol=2e-5, atol=1e-6)  # clipping would hide a wrong scale
    for mine, theirs in zip(gradients.steps, stock_gradients.steps, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=0, atol=1e-6)
    assert callback.report.features["packing"].metrics["packed_batches"] > 0
    return callback.report


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(tmp_path, family, side):
    # A left-padded stock run trains each first label from padding; masking it makes the two runs comparable.
    report = compare(tmp_path, tiny_model(family), collator=Pad(side, mask_prompt=1))
    metrics = report.features["packing"].metrics
    assert metrics["padding_removed"] > 0 and metrics["dropped_labels"] == 0 and "unpacked_batches" not in metrics


@pytest.mark.parametrize("family", FAMILIES)
def test_first_labels_of_right_padded_rows_are_never_trained(tmp_path, family):
    compare(tmp_path, tiny_model(family), collator=Pad("right"))


def test_first_labels_of_left_padded_rows_are_dropped_and_reported(tmp_path):
    callback = FastFTCallback()
    make_trainer(tmp_path, tiny_model(), collator=Pad("left"), callbacks=[callback]).train()
    assert callback.report.features["packing"].metrics["dropped_labels"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_flattening_collator(tmp_path, family):
    """Batches that are packed already, as stock understands them by their position_ids."""
    compare(tmp_path, tiny_model(family), collator=transformers.DataCollatorWithFlattening())


def test_flattening_collator_with_flash_arguments(tmp_path):
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    compare(tmp_path, tiny_model(), collator=collator)


def several_packed_rows(features):
    """Two rows of the same length, each of several documents, told apart by position_ids alone."""
    flat = [token for feature in features for token in feature["input_ids"]][:24]
    starts = [0, 5, 6, 12, 17]
    position = [index - max(start for start in starts if start <= index % 12 or start == 0) for index in range(12)]
    ids = torch.tensor(flat + [1] * (24 - len(flat))).view(2, 12)
    position_ids = torch.tensor([position, list(range(12))])
    labels = ids.clone()
    labels[position_ids == 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": position_ids}


def test_several_packed_rows(tmp_path):
    compare(tmp_path, tiny_model(), collator=several_packed_rows)


class Tokenizer:
    """What transformers' collators ask of a tokenizer."""

    def __new__(cls, side):
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordLevel

        backend = Backend(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w1"))
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side=side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["seq2seq", "language modeling"])
def test_collators_of_transformers(tmp_path, kind, side):
    data = documents()
    if kind == "seq2seq":
        data = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in data]
        collator = transformers.DataCollatorForSeq2Seq(Tokenizer(side))
        compare(tmp_path, tiny_model(), collator=collator, data=data)
    elif side == "right":
        compare(
            tmp_path, tiny_model(), collator=transformers.DataCollatorForLanguageModeling(Tokenizer(side), mlm=False)
        )


def test_rows_of_one_length_without_a_mask(tmp_path):
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in documents(shortest=9, longest=9)]
    compare(tmp_path, tiny_model(), collator=transformers.default_data_collator, data=data)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {"dataloader_num_workers": 2, "max_steps": 3},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 14},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 0.5},
        # a large epsilon: with a small one, Adam turns rounding of near-zero gradients into whole steps
        {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-2},
        {"auto_find_batch_size": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer(tmp_path, options):
    compare(tmp_path, tiny_model(), **options)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations(tmp_path, implementation):
    model = tiny_model("mistral")
    model.set_attn_implementation(implementation)
    compare(tmp_path, model)


def test_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules="all-linear", r=4, lora_alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide a wrong gradient of lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    compare(tmp_path, model)


def test_evaluation_during_training_is_unchanged(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "trainer_options": {"eval_dataset": documents(seed=3)}}
    model, callback = tiny_model("mistral"), FastFTCallback()
    stock = make_trainer(tmp_path, model, learning_rate=0.0, **options)
    ours = make_trainer(tmp_path, model, learning_rate=0.0, callbacks=[callback], **options)
    seen = []
    for trainer in (stock, ours):
        trainer.train()
        seen.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert seen[0] == seen[1], "with equal weights, evaluation is bitwise stock's"
    assert callback.report.features["packing"].metrics["packed_batches"] == ours.args.max_steps


def test_resumed_training_goes_on_as_stock_does(tmp_path):
    model, ends = tiny_model(), []
    for name, callbacks in (("stock", []), ("ours", [FastFTCallback()])):
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "callbacks": callbacks}
        make_trainer(tmp_path / name, model, **options).train()
        resumed = make_trainer(tmp_path / name, model, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-3"))
        ends.append((losses(resumed), resumed.model.state_dict()))
    assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_saved_checkpoints_load_without_fastft(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    stock, ours = (
        make_trainer(tmp_path / name, tiny_model(), callbacks=callbacks, **options)
        for name, callbacks in (("stock", []), ("ours", [FastFTCallback()]))
    )
    for trainer in (stock, ours):
        trainer.train()
    folders = [tmp_path / name / "checkpoint-5" for name in ("stock", "ours")]
    assert (folders[0] / "config.json").read_text() == (folders[1] / "config.json").read_text()
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    assert loaded[0].keys() == loaded[1].keys()
    assert_close(loaded[1], loaded[0], rtol=0, atol=1e-6)


def test_switched_off_is_bitwise_stock(tmp_path):
    stock = make_trainer(tmp_path, tiny_model())
    ours = make_trainer(tmp_path, tiny_model(), callbacks=[FastFTCallback({"packing": "off"})])
    for trainer in (stock, ours):
        trainer.train()
    assert losses(stock) == losses(ours)
    for name, parameter in stock.model.state_dict().items():
        assert torch.equal(parameter, ours.model.state_dict()[name]), name


def test_no_bit_of_a_document_depends_on_another():
    model = tiny_model("mistral").train()
    batch = PaddingFreeCollator(Pad())(documents(count=4, shortest=8, longest=8))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 8:16] = (changed["input_ids"][:, 8:16] + 1) % VOCABULARY
    with apply(model):
        before, after = model(**batch).logits, model(**changed).logits
    others = torch.ones(32, dtype=torch.bool)
    others[8:16] = False
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, ~others], after[:, ~others])


def test_own_loop_with_apply_matches_the_padded_batch():
    model = tiny_model("qwen3").train()
    rows = documents(count=6)
    model(**Pad()(rows)).loss.backward()
    stock = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with apply(model) as run:
        model(**PaddingFreeCollator(Pad())(rows)).loss.backward()
    assert run.report.features["packing"].enabled
    assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, stock, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_padded_batches_may_interleave(checkpointing):
    """Forward of a packed batch, forward of a padded one, then both backwards: the recompute finds its own metadata."""
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows, other = documents(count=4), documents(count=4, seed=5)

    def gradients(first, second):
        model.zero_grad()
        loss = model(**first, use_cache=False).loss + 2 * model(**second, use_cache=False).loss
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    stock = gradients(Pad()(rows), Pad()(other))
    with apply(model):
        ours = gradients(PaddingFreeCollator(Pad())(rows), Pad()(other))
    assert_close(ours, stock, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed by TRL"])
def test_sft_trainer_of_trl(tmp_path, packing):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer, runs, callback = Tokenizer("right"), [], FastFTCallback({"packing": "on"})
    tokenizer.eos_token = "w2"
    for callbacks in ([], [callback]):
        config = trl.SFTConfig(
            **DEFAULTS,
            output_dir=str(tmp_path),
            bf16=False,
            gradient_checkpointing=False,
            packing=packing,
            max_length=64,
        )
        trainer = trl.SFTTrainer(
            tiny_model("qwen3"),
            config,
            train_dataset=datasets.Dataset.from_list(documents()),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
        runs.append((losses(trainer), dict(trainer.model.state_dict())))
    assert_close(runs[1], runs[0], rtol=2e-6, atol=2e-6)
    assert callback.report.features["packing"].metrics["packed_batches"] == 5
