"""Users of FlashAttention and flex_attention keep it: packed training is their stock training, fed once a batch."""

from __future__ import annotations

import functools

import pytest
import torch
from family_models import tiny_family
from hf_helpers import Pad, documents, grad_norms, losses, make_trainer
from own_attention_helpers import Flash, Flex
from test_families import GRADIENT_TOLERANCE, PACKED, difference, gradient_of
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention
from torch.testing import assert_close
from transformers import AttentionInterface
from transformers import masking_utils as masks
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_integration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastft_hf.families import FAMILIES as FAMILY_TABLE
from fastft_plugins import FastFTCallback, apply
from fastft_plugins.packing import PaddingFreeCollator

FLASH = ["flash_attention_2", "flash_attention_3", "flash_attention_4"]
# Of gemma3n, stock's own gradients are NaN for padding, of which FlashAttention's results are zeros.
FAMILIES = [name for name in PACKED if name != "gemma3n_text"]


@pytest.fixture
def flash(monkeypatch):
    fake = Flash()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def flex(monkeypatch):
    fake = Flex()
    fake.install(monkeypatch)
    return fake


def model_with(implementation, family="llama", **overrides):
    """``set_attn_implementation`` asks for the package of FlashAttention, and for a GPU."""
    model = tiny_family(family, **overrides).train()
    model.config._attn_implementation_internal = implementation
    return model


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: gradient_of(parameter) for name, parameter in model.named_parameters()}


def assert_packed_is_stock(model, side="right"):
    """Returns what the run reports about packing."""
    padded = Pad(side, mask_prompt=1)(documents(count=5, shortest=3, longest=24))
    stock_loss, stock = loss_and_gradients(model, padded)
    with apply(model, {"packing": "on"}) as run:
        loss, gradients = loss_and_gradients(model, run.collator(lambda batch: batch)(padded))
    assert_close(loss, stock_loss, rtol=2e-6, atol=2e-6)
    assert difference(gradients, stock) < GRADIENT_TOLERANCE.get(model.config.model_type, 3e-5)
    return run.report.features["packing"]


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_trains_as_in_stock(flash, family):
    side = "left" if FAMILY_TABLE[family].moves_positions else "right"
    packing = assert_packed_is_stock(model_with("flash_attention_2", family), side)
    assert packing.metrics["packed_batches"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_trains_as_in_stock(flex, family):
    model = model_with("flex_attention", family)
    if any("sink" in name for name, _ in model.named_parameters()):
        pytest.skip("transformers has no sinks for flex_attention on a CPU")
    assert assert_packed_is_stock(model).metrics["packed_batches"] == 1


@pytest.mark.parametrize("implementation", FLASH)
def test_the_report_names_what_was_chosen_and_why(flash, implementation):
    changes = assert_packed_is_stock(model_with(implementation)).changes
    expected = f"through the model's own {implementation}, which gets cu_seq_lens and max_length made once a batch"
    assert any(expected in change for change in changes)
    assert not any(change.startswith("attention kernel") for change in changes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flash_attention_gets_one_set_of_boundaries_a_batch(flash, monkeypatch, checkpointing):
    """On a GPU a maximum that is a tensor makes each layer wait, and so does looking for the documents."""

    def look(*args, **kwargs):
        raise AssertionError("a layer looked for documents that it was given")

    model = model_with("flash_attention_2", "gemma2")
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = PaddingFreeCollator(Pad())(documents(4))
    for name in ("prepare_fa_kwargs_from_position_ids", "_get_unpad_data"):
        monkeypatch.setattr(flash_utils, name, look)
    monkeypatch.setattr(flash_utils, "_is_packed_sequence", lambda position_ids, **more: position_ids and look())
    monkeypatch.setattr(masks, "find_packed_sequence_indices", look)
    with apply(model, {"packing": "on"}):
        model(**batch).loss.backward()
    assert len(flash.calls) == 3 * (1 + checkpointing)
    for call in flash.calls:
        assert call["cu_seqlens"] is batch["fastft_metadata"].cu_seqlens
        assert all(type(longest) is int for longest in call["max_seqlen"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gemma2", 2)])
def test_flex_attention_gets_one_mask_for_each_kind_of_layer(flex, monkeypatch, family, kinds, checkpointing):
    def make(*args, **kwargs):
        raise AssertionError("transformers made a block mask of its own")

    model = model_with("flex_attention", family)
    if checkpointing:
        model.gradient_checkpointing_enable()
    monkeypatch.setattr(masks, "create_block_mask", make)
    with apply(model, {"packing": "on"}):
        model(**PaddingFreeCollator(Pad())(documents(4))).loss.backward()
    assert len(flex.masks) == 3 * (1 + checkpointing) and len(set(map(id, flex.masks))) == kinds


def test_torchs_own_flex_attention_takes_the_mask(monkeypatch):
    """Uncompiled, and forward alone: it has no backward on a CPU. Rows of more than one block."""

    def attend(*args, training=False, **kwargs):
        return flex_attention.flex_attention(*args, **kwargs)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", attend)
    model = model_with("flex_attention", "gemma3_text", sliding_window=40)
    batch = PaddingFreeCollator(Pad())(documents(count=4, shortest=60, longest=110))
    with torch.no_grad(), apply(model, {"packing": "on"}):
        logits = model(**batch).logits
    model.config._attn_implementation_internal = "sdpa"
    with torch.no_grad(), apply(model, {"packing": "on"}):
        assert_close(logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_flex_attention_is_compiled_for_rows_of_any_length_and_all_windows(monkeypatch):
    """torch compiles a function anew where it finds another mask function or shape, and after eight times no more."""
    counter = CompileCounter()
    compiled = torch.compile(flex_attention.flex_attention, backend=counter)
    monkeypatch.setattr(
        flex_integration, "compile_friendly_flex_attention", lambda *args, training, **more: compiled(*args, **more)
    )
    model = model_with("flex_attention", "gemma2")
    with torch.no_grad(), apply(model, {"packing": "on"}):
        for seed in range(6):
            model(**PaddingFreeCollator(Pad())(documents(4, shortest=20, longest=200, seed=seed)))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_no_document_sees_another(flash, flex, implementation):
    model = model_with(implementation, "gemma2").eval()
    batch = PaddingFreeCollator(Pad())(documents(count=4, shortest=8, longest=8))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 8:16] = (changed["input_ids"][:, 8:16] + 1) % 90
    others = batch["seq_idx"][0] != 1
    with torch.no_grad(), apply(model, {"packing": "on"}):
        before, after = model(**batch).logits, model(**changed).logits
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.allclose(before[:, ~others], after[:, ~others], atol=1e-2)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_padded_batch_inside_a_run_is_stocks(flash, flex, family, implementation):
    """An evaluation, or a batch that cannot be packed: bit for bit, and the model's settings are there afterwards."""
    model, padded = model_with(implementation, family).eval(), Pad()(documents(4))
    with torch.no_grad():
        stock = model(**padded).logits
        with apply(model, {"packing": "on"}):
            assert torch.equal(model(**padded).logits, stock)
        assert torch.equal(model(**padded).logits, stock)
    assert model.config._attn_implementation == implementation
    assert "fastft" not in AttentionInterface._global_mapping


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_the_trainer_trains_as_in_stock(tmp_path, flash, flex, implementation):
    callback = FastFTCallback({"packing": "on"})
    model = model_with(implementation, "mistral")
    stock, ours = (make_trainer(tmp_path, model, callbacks=each, max_steps=3) for each in ([], [callback]))
    stock.train(), ours.train()
    assert_close(losses(ours), losses(stock), rtol=2e-6, atol=2e-6)
    assert_close(grad_norms(ours), grad_norms(stock), rtol=2e-5, atol=1e-6)
    assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=0, atol=2e-6)
    assert callback.report.features["packing"].metrics["packed_batches"] == 3


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_a_function_of_ones_own_under_that_name_declines(monkeypatch, implementation):
    """It may wrap stock's; what it does besides, nobody knows."""
    stock = ALL_ATTENTION_FUNCTIONS[implementation]

    @functools.wraps(stock)
    def own(*args, **kwargs):
        return stock(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, own)
    with apply(model_with(implementation)) as run:
        pass
    packing = run.report.features["packing"]
    assert not packing.enabled and "attends by code of test_own_attention" in packing.reason


@pytest.mark.parametrize("implementation", ["paged|sdpa", "an_implementation_nobody_knows"])
def test_other_implementations_decline(implementation):
    model = model_with(implementation)
    with apply(model) as run:
        pass
    assert f"attention implementation '{implementation}' is kept" in run.report.features["packing"].reason


def test_dropout_declines_with_flash_attention_too(flash):
    with apply(model_with("flash_attention_2", attention_dropout=0.1)) as run:
        pass
    assert "attention_dropout is 0.1" in run.report.features["packing"].reason
