"""A loop of one's own: what collates its batches, what reaches the model, and what the report says of it."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import transformers
from family_models import tiny_family
from hf_helpers import Pad, documents, losses, make_trainer, tiny_model
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from fastft_plugins import FastFTCallback, FastFTError, apply
from fastft_plugins.packing import METADATA_KEY, PackedMetadata, PaddingFreeCollator, packed_attention
from fastft_plugins.packing.metadata import NotPacked

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
# What no run packs: switched off, a rotary embedding that depends on the padding, a family that declines.
NOT_PACKED = [
    (lambda: tiny_model(), {"packing": "off"}, "switched off"),
    (lambda: tiny_model(rope_parameters=DYNAMIC), None, "dynamic"),
    (lambda: tiny_family("gpt2"), None, "counts first labels"),
]


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fastft"]


def loop(model, loader):
    return [model(**batch).loss.item() for batch in loader]


def test_no_backward_copies_a_gradient_into_zeros():
    """As that of a selection of the one row does, for each layer's queries, keys and values."""
    model = tiny_model().train()
    with apply(model, {"packing": "on"}) as run:
        loss = model(**run.collator(Pad())(documents(4))).loss
    nodes, pending = set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending += [following for following, _ in node.next_functions]
    assert len(nodes) > 100 and not any(node.name().startswith("Select") for node in nodes)


# Packed batches meet only models that pack


@pytest.mark.parametrize(("make_model", "config", "reason"), NOT_PACKED, ids=["off", "rope", "family"])
def test_the_run_gives_the_collator_that_its_model_can_take(make_model, config, reason):
    model = make_model().train()
    stock = loop(model, DataLoader(documents(16), 4, collate_fn=Pad()))
    with apply(model, config) as run:
        collator = Pad()
        assert run.collator(collator) is collator
        assert loop(model, DataLoader(documents(16), 4, collate_fn=run.collator(collator))) == stock
    assert reason in run.report.features["packing"].reason


def test_the_run_that_packs_gives_a_padding_free_collator():
    model = tiny_model().train()
    stock = loop(model, DataLoader(documents(16), 4, collate_fn=Pad()))
    with apply(model, {"packing": "on"}) as run:
        ours = loop(model, DataLoader(documents(16), 4, collate_fn=run.collator(Pad())))
    torch.testing.assert_close(ours, stock, rtol=2e-6, atol=2e-6)
    assert run.report.features["packing"].metrics["packed_batches"] == 4


def test_the_collator_of_a_run_keeps_the_positions_of_its_family():
    model = tiny_family("gpt_bigcode").train()
    batch = Pad("left", 1)(documents(4))
    with apply(model) as run:
        assert "moves its positions" in run.collator(lambda batch: batch)(batch)[METADATA_KEY].reason


@pytest.mark.parametrize(("make_model", "config", "reason"), NOT_PACKED, ids=["off", "rope", "family"])
def test_a_packed_batch_is_refused_where_packing_is_off(make_model, config, reason):
    model, batch = make_model().train(), PaddingFreeCollator(Pad())(documents(4))
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with apply(model, config):
        for called in (model, model.base_model, torch.nn.Sequential(model)[0]):
            with pytest.raises(FastFTError, match=rf"packing is off .*{reason}.*run\.collator\(collator\)"):
                called(**batch)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_model_inside_ones_own_wrapper_refuses_too():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()

        def forward(self, batch):
            return self.inner(**batch).loss

    model = Wrapper().train()
    with apply(model, {"packing": "off"}):
        assert model(Pad()(documents(4))) > 0
        with pytest.raises(FastFTError, match="a packed batch reached LlamaForCausalLM"):
            model(PaddingFreeCollator(Pad())(documents(4)))


def test_a_trainer_with_a_packing_collator_of_its_own_refuses_where_packing_is_off(tmp_path):
    options = {"collator": PaddingFreeCollator(Pad()), "callbacks": [FastFTCallback({"packing": "off"})]}
    trainer = make_trainer(tmp_path, tiny_model(), **options)
    with pytest.raises(FastFTError, match="switched off in the config"):
        trainer.train()
    assert losses(trainer) == [] and not trainer.model._forward_pre_hooks


# The batch is what loops expect of one


@pytest.mark.parametrize("as_encoding", [False, True], ids=["dict", "BatchEncoding"])
def test_ordinary_ways_to_move_and_read_a_batch(as_encoding):
    model = tiny_model().train()
    with apply(model, {"packing": "on"}) as run:
        collator = run.collator(lambda rows: BatchEncoding(Pad()(rows)) if as_encoding else Pad()(rows))
        moved = {name: value.to("cpu") for name, value in collator(documents(4)).items()}
        batch = collator(documents(4))
        assert batch.to("cpu") is batch and batch.to("cpu", non_blocking=True)[METADATA_KEY].total_tokens > 0
        assert torch.equal(batch.input_ids, batch["input_ids"])
        assert torch.equal(model(**batch).loss, model(**moved).loss)


def test_a_packed_batch_stays_a_dict_and_copies_and_pickles():
    batch = PaddingFreeCollator(Pad())(documents(4))
    for other in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert isinstance(other, dict) and type(other) is type(batch) and other.keys() == batch.keys()
        assert isinstance(other.fastft_metadata, PackedMetadata) and other.max_length_q == batch["max_length_q"]
    with pytest.raises(AttributeError, match="no 'attention_mask'; it has input_ids"):
        batch.attention_mask  # noqa: B018


def test_moving_a_batch_moves_its_metadata():
    batch = PaddingFreeCollator(Pad())(documents(4)).to("meta")
    assert batch.input_ids.device.type == batch[METADATA_KEY].cu_seqlens.device.type == "meta"
    assert batch.cu_seq_lens_q is batch.cu_seq_lens_k is batch[METADATA_KEY].cu_seqlens  # one copy for all
    assert all(value.is_meta for value in batch.values() if isinstance(value, torch.Tensor))
    short = PaddingFreeCollator(Pad(), flash_arguments=False)(documents(4))
    assert list(short) == list(short.to("meta")), "the move added columns"


def test_metadata_that_stayed_behind_follows_the_tokens_to_their_device():
    """Loops that move tensors alone leave it on the host."""
    model = tiny_model().train().to("meta")
    with apply(model, {"packing": "on"}) as run:
        batch = run.collator(Pad())(documents(4))
        moved = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        assert moved[METADATA_KEY].cu_seqlens.device.type == "cpu"
        assert model(**moved).logits.shape[1] == batch[METADATA_KEY].total_tokens


# What the report says


def test_batches_without_metadata_are_warned_of_once_and_packing_is_not_called_on(caplog):
    model = tiny_model().train()
    with apply(model) as run:
        loop(model, DataLoader(documents(16), 4, collate_fn=Pad()))
    packing = run.report.features["packing"]
    assert not packing.enabled and packing.reason.startswith("no batch was packed: no packed metadata came")
    assert any(change.startswith("all 4 batches stayed") for change in packing.changes)
    (warning,) = warnings_in(caplog)
    assert "run.collator(collator)" in warning


@pytest.mark.parametrize("config", [{"packing": "on"}, {"strict": True}])
def test_a_batch_without_metadata_raises_where_packing_must_be_on(config):
    model = tiny_model().train()
    with pytest.raises(FastFTError, match=r"run\.collator\(collator\)"), apply(model, config | {"moe": "off"}):
        model(**Pad()(documents(4)))


def test_evaluation_and_generation_are_no_training_batches():
    model = tiny_model().train()
    with apply(model, {"packing": "on"}) as run:
        model(**run.collator(Pad())(documents(4))).loss.backward()
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
        model.eval()
        model(**Pad()(documents(4)))
    assert run.report.features["packing"].metrics["packed_batches"] == 1
    assert "unpacked_batches" not in run.report.features["packing"].metrics


@pytest.mark.parametrize(("training", "gradients"), [(False, True), (True, False), (False, False)])
def test_no_batch_of_an_evaluation_counts(training, gradients):
    """Packed, kept as the collator made it, or from another loader; under "on", a training batch would raise."""
    model = tiny_model().train()
    with apply(model, {"packing": "on"}) as run:
        packed, kept = (run.collator(make)(documents(4)) for make in (Pad(), lambda rows: {**Pad()(rows), "image": 0}))
        del kept["image"]
        model.train(training)
        with torch.set_grad_enabled(gradients):
            model(**kept), model(**Pad()(documents(4)))
            if not gradients:
                model(**packed)
        assert isinstance(kept[METADATA_KEY], NotPacked) and run.report.features["packing"].metrics == {}
        model.train()(**packed).loss.backward()
    assert run.report.features["packing"].metrics["packed_batches"] == 1


def test_the_report_names_the_kernels_of_its_own_run():
    row = torch.zeros(3, 1, 8)
    packed_attention(row, row, row, PackedMetadata.from_lengths([3]), softcap=2.0)
    model = tiny_model().train()
    with apply(model) as run:
        model(**run.collator(Pad())(documents(4))).loss.backward()
    (kernel,) = [change for change in run.report.features["packing"].changes if "attention kernel" in change]
    assert "reference" not in kernel


def test_a_block_without_any_training_batch_says_so(caplog):
    with apply(tiny_model()) as run:
        pass
    packing = run.report.features["packing"]
    assert not packing.enabled and "none with packed metadata reached the model in training" in packing.reason
    assert warnings_in(caplog) == []


def test_a_loop_in_evaluation_mode_that_never_packs_is_warned_of_at_its_end(caplog):
    """It may train or only evaluate, so it is not refused."""
    model = tiny_model().eval()
    with apply(model, {"packing": "on"}) as run:
        loop(model, DataLoader(documents(16), 4, collate_fn=Pad()))
    assert not run.report.features["packing"].enabled
    assert len(warnings_in(caplog)) == 1


def test_a_model_in_evaluation_mode_that_trains_is_counted():
    """As `from_pretrained` returns it."""
    model = tiny_model().eval()
    with apply(model) as run:
        model(**run.collator(Pad())(documents(4))).loss.backward()
    assert run.report.features["packing"].enabled
    assert run.report.features["packing"].metrics["packed_batches"] == 1


def test_a_batch_that_the_loss_runs_twice_is_counted_once():
    model = tiny_model().train()
    with apply(model) as run:
        for _ in range(2):
            batch = run.collator(Pad())(documents(4))
            (model(**batch).loss + model(**batch).logits.mean()).backward()
    metrics = run.report.features["packing"].metrics
    assert metrics["packed_batches"] == 2 and metrics["documents"] == 8


@pytest.mark.parametrize("config", [None, {"packing": "off"}], ids=["on", "off"])
def test_a_whole_model_pickles_during_a_run_and_forgets_it(config):
    model, batch = tiny_model().train(), PaddingFreeCollator(Pad())(documents(4))
    with apply(model, config) as run:
        copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        for other in copies:
            other(**batch)
        assert run.report.features["packing"].metrics == {}
    expected = model(**Pad()(documents(4))).loss
    assert all(torch.equal(other(**Pad()(documents(4))).loss, expected) for other in copies)


def test_models_that_are_not_served_are_named(caplog):
    caplog.set_level(logging.WARNING, logger="fastft")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    two = torch.nn.ModuleList([tiny_model(), tiny_model()])
    for model, words in (
        (transformers.BertForMaskedLM(config), "BertForMaskedLM, model type 'bert', is no causal language model"),
        (two, "ModuleList holds 2 causal language models"),
    ):
        with apply(model) as run:
            pass
        assert words in run.report.features["packing"].reason


def test_the_collator_of_a_run_packs_no_longer_than_the_run():
    model, rows = tiny_model().train(), documents(4)
    for _ in range(2):
        with apply(model, {"packing": "on"}) as run:
            collator = run.collator(Pad())
            assert collator(rows)["input_ids"].shape[0] == 1
        torch.testing.assert_close(dict(collator(rows)), dict(Pad()(rows)))
