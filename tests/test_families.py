"""Every causal language model of the installed transformers, trained packed and padded: the table of families is true.

A model type that the table calls packed must train as stock does, to rounding, without a leak between documents. One
that it declines must decline, and must still come out different when it is packed all the same.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from family_models import VOCABULARY, causal_lm_classes, tiny_family
from hf_helpers import Pad, documents
from torch.testing import assert_close

from fastft_hf import families, suitability
from fastft_hf.families import FAMILIES, WINDOWED, Family
from fastft_hf.model import _attention_forward
from fastft_hf.stock_attention import sdpa_refuses_softcap
from fastft_plugins import FastFTError, apply
from fastft_plugins.packing import METADATA_KEY, PackedMetadata, PaddingFreeCollator

PACKED = sorted(name for name in causal_lm_classes() if name in FAMILIES and FAMILIES[name].layers)
DECLINED = sorted(name for name in causal_lm_classes() if name in FAMILIES and not FAMILIES[name].layers)
ABSOLUTE = [name for name in PACKED if not FAMILIES[name].moves_positions]
CONFIG = {"packing": "on", "moe": "off"}
ROWS = [documents(count=5, shortest=3, longest=24, seed=seed) for seed in range(3)]
# The gradients of these are sums of large terms that nearly cancel.
GRADIENT_TOLERANCE = dict.fromkeys(("diffllama", "gemma4_text", "gemma4_unified_text"), 3e-4)
# Reasons that say nothing about what the installed version would do.
UNPROVEN = (families.COUNTED, families.UNTRIED, families.MULTIMODAL, families.VERSIONS)


def variants():
    """Each packed type; where windows are one switch for all layers of a config, with and without."""
    for name in PACKED:
        yield pytest.param(name, {}, id=name)
        per_layer = getattr(causal_lm_classes()[name].config_class(), "layer_types", None)
        if FAMILIES[name].layers == WINDOWED and not per_layer:
            yield pytest.param(name, {"sliding_window": None}, id=f"{name} without windows")


def train(model, batches):
    """Three steps of SGD. Returns the losses, the gradients of each step, their norms, and the weights at the end."""
    losses, gradients, norms = [], [], []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: gradient_of(parameter) for name, parameter in model.named_parameters()})
        norms.append(torch.stack([gradient.norm() for gradient in gradients[-1].values()]).norm().item())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.02 / max(norms[-1], 1) * gradients[-1][name]
    return losses, gradients, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def gradient_of(parameter):
    """Of an expert that no token reached it is zero; stock sends padding to experts too, with a gradient of zero."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def difference(ours, stock):
    """The largest difference of two sets of tensors, each measured by the larger of its own and the typical size."""
    assert ours.keys() == stock.keys()
    typical = 0.01 * max(tensor.abs().max() for tensor in stock.values())
    return max(float((ours[name] - t).abs().max() / torch.maximum(t.abs().max(), typical)) for name, t in stock.items())


def assert_same_training(model_type, padded, packed, **overrides):
    stock = train(tiny_family(model_type, **overrides).train(), padded)
    model = tiny_family(model_type, **overrides).train()
    with apply(model, CONFIG) as run:
        ours = train(model, packed)
    assert run.report.features["packing"].metrics["packed_batches"] == len(packed)
    assert_close(ours[0], stock[0], rtol=2e-6, atol=2e-6)
    assert_close(ours[2], stock[2], rtol=3e-5, atol=1e-6)
    for mine, theirs in zip(ours[1], stock[1], strict=True):
        assert difference(mine, theirs) < GRADIENT_TOLERANCE.get(model_type, 3e-5)
    assert difference(ours[3], stock[3]) < 3e-6


def test_every_installed_causal_language_model_is_in_the_table():
    missing = sorted(set(causal_lm_classes()) - set(FAMILIES))
    assert not missing, f"add these to fastft_hf/families.py, packed or with the reason why not: {missing}"


def test_the_page_for_people_is_the_table():
    page = Path(__file__).parents[1] / "docs" / "families.md"
    assert page.read_text() == families.as_markdown() + "\n", "run python -m fastft_hf.families > docs/families.md"


def test_many_families_are_packed():
    assert len(PACKED) >= 70


@pytest.mark.parametrize(("model_type", "overrides"), variants())
def test_packed_training_is_stocks(model_type, overrides):
    sides = ["right", "left" if FAMILIES[model_type].moves_positions else "right", "right"]
    padded = [Pad(side, mask_prompt=1)(rows) for side, rows in zip(sides, ROWS, strict=True)]
    packed = [PaddingFreeCollator(lambda batch: batch)(batch) for batch in padded]
    assert_same_training(model_type, padded, packed, **overrides)


@pytest.mark.parametrize("model_type", PACKED)
def test_tiny_models_have_every_kind_of_layer_that_the_table_promises(model_type):
    kinds = suitability.layer_kinds(tiny_family(model_type).config)
    config_class = causal_lm_classes()[model_type].config_class
    if getattr(config_class(), "layer_types", None):
        assert kinds == FAMILIES[model_type].layers
    else:
        assert kinds <= FAMILIES[model_type].layers and ("sliding_attention" in kinds) == (
            FAMILIES[model_type].layers == WINDOWED
        )


@pytest.mark.parametrize("model_type", PACKED)
def test_no_document_sees_another(model_type):
    """Document 1 changes; the others' logits keep every bit, and have a gradient of exactly zero in its embeddings."""
    model = tiny_family(model_type).eval()
    batch = PaddingFreeCollator(Pad())(documents(count=4, shortest=8, longest=8))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 8:16] = (changed["input_ids"][:, 8:16] + 1) % VOCABULARY
    others_T = batch["seq_idx"][0] != 1
    embedded = []
    with apply(model, CONFIG):
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
        before, after = model(**batch).logits, model(**changed).logits
        hook.remove()
    (gradient,) = torch.autograd.grad(before[:, others_T].sum(), embedded[0])
    assert torch.count_nonzero(gradient[0, ~others_T]) == 0 and torch.count_nonzero(gradient[0, others_T]) > 0
    if any("expert" in name for name, _ in model.named_modules()):
        # An expert multiplies the tokens of all documents at once, and the last bit of a product varies with how many.
        assert_close(after[:, others_T], before[:, others_T], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after[:, others_T], before[:, others_T])
    assert not torch.allclose(before[:, ~others_T], after[:, ~others_T], atol=1e-2)


@pytest.mark.parametrize("model_type", ABSOLUTE)
def test_positions_that_count_are_not_moved(model_type, monkeypatch):
    """A left-padded batch stays padded or is refused, and rightly: packed, it would train otherwise than stock."""
    padded = [Pad("left", mask_prompt=1)(rows) for rows in ROWS]
    packed = [PaddingFreeCollator(lambda batch: batch)(batch) for batch in padded]
    kept = PaddingFreeCollator(lambda batch: batch, move_positions=False)(padded[0])
    assert "moves its positions" in kept[METADATA_KEY].reason
    model = tiny_family(model_type).train()
    with apply(model, CONFIG), pytest.raises(FastFTError, match="move_positions=False"):
        model(**packed[0])
    if model_type == "ministral3":
        pytest.skip("its scale starts beyond the longest positions of a tiny model")
    monkeypatch.setitem(suitability.FAMILIES, model_type, Family(FAMILIES[model_type].layers))
    with pytest.raises(AssertionError):
        assert_same_training(model_type, padded, packed)


@pytest.mark.parametrize("model_type", DECLINED)
def test_declined_families_could_not_be_packed(model_type, monkeypatch):
    reason = FAMILIES[model_type].reason
    assert reason
    if reason in UNPROVEN:
        return
    kinds = {"conv", "hybrid", "hybrid_sliding", "chunked_attention", "linear_attention", "mamba", "indexed_attention"}
    monkeypatch.setitem(suitability.FAMILIES, model_type, Family(frozenset(WINDOWED | kinds)))
    padded = [Pad("right", mask_prompt=1)(rows) for rows in ROWS]
    packed = [PaddingFreeCollator(lambda batch: batch)(batch) for batch in padded]
    try:
        assert_same_training(model_type, padded, packed)
    except Exception:  # another result, an error of the model's own, or declined for a second reason
        return
    pytest.fail(f"'{model_type}' is packed exactly: move it to the packed ones in fastft_hf/families.py")


@pytest.mark.parametrize("model_type", ["phimoe", "bart", "roberta", "llama4_text"])
def test_a_declined_family_trains_stock_with_the_reason(model_type):
    model, batch = tiny_family(model_type), Pad()(ROWS[0])
    stock = model.eval()(**batch).logits
    with apply(model) as run:
        assert torch.equal(model(**batch).logits, stock)
    assert FAMILIES[model_type].reason in run.report.features["packing"].reason


def test_a_model_type_nobody_tested_declines(monkeypatch):
    model = tiny_family("llama")
    monkeypatch.delitem(suitability.FAMILIES, "llama")
    with apply(model) as run:
        pass
    assert "'llama' is not among the tested ones" in run.report.features["packing"].reason


def test_a_kind_of_layer_that_the_family_was_not_tested_with_declines():
    """Stock masks a window here that it does not tell its attention function: packed, the window would be lost."""
    model = tiny_family("qwen2_moe", layer_types=["full_attention", "sliding_attention", "full_attention"])
    with apply(model) as run:
        pass
    assert "'sliding_attention' are not tested for model type 'qwen2_moe'" in run.report.features["packing"].reason


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop", "router_jitter_noise"])
def test_a_model_that_draws_random_numbers_declines(name):
    model_type = {"attention_dropout": "llama", "resid_pdrop": "gpt_bigcode", "router_jitter_noise": "mixtral"}[name]
    with apply(tiny_family(model_type, **{name: 0.1})) as run:
        pass
    assert f"{name} is 0.1" in run.report.features["packing"].reason


def called_with(implementation, **arguments):
    """Packed attention as a module of a model with this attention implementation calls it."""
    q, metadata = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)), PackedMetadata.from_lengths([3])
    module = torch.nn.Identity()
    stock_config = SimpleNamespace(_attn_implementation=implementation)
    module.config = SimpleNamespace(_fastft_stock_config=stock_config)
    return _attention_forward(module, q, q, q, None, fastft_metadata=metadata, **arguments)[0]


@pytest.mark.parametrize("extra", [{"position_bias": torch.zeros(1)}, {"dropout": 0.1}, {"is_causal": False}], ids=str)
def test_attention_called_with_what_packing_does_not_know_is_an_error(extra):
    with pytest.raises(FastFTError, match=next(iter(extra))):
        called_with("sdpa", **extra)


@pytest.mark.parametrize("extra", [{"softcap": 0.5}, {"s_aux": torch.ones(2)}], ids=["softcap", "sinks"])
def test_softcap_and_sinks_count_where_they_count_in_stock(extra):
    """transformers 5.17 trains Gemma2 with sdpa, which ignores its softcap: so must the packed run. 5.24 refuses."""
    if "softcap" in extra and sdpa_refuses_softcap():
        with pytest.raises(FastFTError, match="passes a softcap, which stock's 'sdpa' refuses"):
            called_with("sdpa", **extra)
    else:
        assert torch.equal(called_with("sdpa", **extra), called_with("sdpa"))
    assert not torch.allclose(called_with("eager", **extra), called_with("eager"), atol=1e-3)
