"""The experts of every model behind transformers' experts interface, found by reading its source, against stock."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from moe_helpers import experts_class, gradients, stock_forward, tiny_causal_lm
from torch.testing import assert_close

from fastft_hf.experts import _is_experts
from fastft_plugins import apply
from fastft_plugins.moe import experts_forward
from fastft_plugins.moe.gates import gate_of

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 4, 6, 5, 11, 2
DECORATOR = "@use_experts_implementation"


def decorated_classes() -> list[tuple[str, str]]:
    """(model, class) of each class that transformers decorates, without importing the models."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        names = re.findall(rf"^{DECORATOR}(?:\([^)]*\))?\s+class (\w+)", source, re.MULTILINE)
        assert len(names) == len(re.findall(f"^{DECORATOR}", source, re.MULTILINE)), f"cannot read {path}"
        found += [(path.parent.name, name) for name in names]
    return found


CLASSES = decorated_classes()

# Classes that no tiny config builds, with the reason.
UNBUILDABLE: dict[str, str] = {}

# Stock computes the activation, the norm or the sum in fp32 whatever it is given.
COMPUTES_IN_FP32 = {
    "BeamExperts",
    "Inkling2Experts",
    "Inkling2LoopExperts",
    "MuseSparkExperts",
    "OpenAIPrivacyFilterExperts",
}

# Gates of a kind that is used nowhere else: served by the model's own function.
NO_KERNEL = {"Inkling2Experts", "Inkling2LoopExperts"}

# What a class asks for beside its config.
ARGUMENTS = {"Ernie4_5_VLMoeMoeExperts": {"intermediate_size": INNER}}


def tiny(config):
    """The config with the sizes that its experts depend on made small."""
    for size, names in {
        EXPERTS: ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts"),
        HIDDEN: ("hidden_size", "moe_hidden_size"),
        INNER: ("intermediate_size", "moe_intermediate_size"),
    }.items():
        for name in names:
            if hasattr(config, name) and not isinstance(getattr(config, name), list):
                setattr(config, name, size)
    return config


def build(model: str, name: str) -> torch.nn.Module:
    """The experts module from the first config of its model that has all it asks for, with random fp64 weights."""
    experts_class = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
    configs = vars(importlib.import_module(f"transformers.models.{model}.configuration_{model}")).values()
    reasons = []
    for config_class in configs:
        if inspect.isclass(config_class) and issubclass(config_class, transformers.PreTrainedConfig):
            try:
                module = experts_class(tiny(config_class()), **ARGUMENTS.get(name, {}))
            except Exception as error:  # a config of another part of the model
                reasons.append(f"{config_class.__name__}: {error}")
                continue
            assert all(size <= 2 * HIDDEN for size in module.down_proj.shape), "the config is not tiny"
            for parameter in module.double().parameters():
                torch.nn.init.normal_(parameter, std=0.5)
            return module
    raise NotImplementedError(f"{name}: {'; '.join(reasons)}")


@pytest.mark.parametrize(("model", "name"), [one for one in CLASSES if one[1] not in UNBUILDABLE])
def test_experts_and_their_gradients_are_stock(model, name):
    module = build(model, name)
    assert _is_experts(module)
    assert (gate_of(module).kind == "other") == (name in NO_KERNEL)
    ids = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K]
    inputs = torch.randn(TOKENS, HIDDEN).double() * 3, ids, torch.rand(TOKENS, TOP_K).double()
    stock = gradients(stock_forward, module, *inputs)
    ours = gradients(experts_forward, module, *inputs)
    tolerance = 1e-5 if name in COMPUTES_IN_FP32 else 1e-11
    assert_close(ours, stock, rtol=tolerance, atol=tolerance)


def test_the_list_of_unbuildable_classes_is_not_stale():
    for model, name in CLASSES:
        if name in UNBUILDABLE:
            with pytest.raises(NotImplementedError):
                build(model, name)
    assert UNBUILDABLE.keys() <= {name for _, name in CLASSES}


@pytest.mark.parametrize(
    ("model", "name", "kind", "layout"),
    [
        ("gpt_oss", "GptOssExperts", "clamped_swiglu", "interleaved"),
        ("openai_privacy_filter", "OpenAIPrivacyFilterExperts", "clamped_swiglu", "concatenated"),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", "clamped_swiglu", "concatenated"),
        ("deepseek_v4", "DeepseekV4Experts", "limited_silu", "concatenated"),
        ("nemotron_h", "NemotronHExperts", "relu2", "ungated"),
        ("gemma4", "Gemma4TextExperts", "gelu_tanh", "concatenated"),
        ("aria", "AriaExperts", "silu", "concatenated"),
        ("muse_spark", "MuseSparkExperts", "silu", "concatenated"),
        ("deepseek_v2", "DeepseekV2Experts", "silu", "concatenated"),
        ("deepseek_v3", "DeepseekV3Experts", "silu", "concatenated"),
        ("qwen2_moe", "Qwen2MoeExperts", "silu", "concatenated"),
        ("qwen3_moe", "Qwen3MoeExperts", "silu", "concatenated"),
        ("qwen3_next", "Qwen3NextExperts", "silu", "concatenated"),
        ("mixtral", "MixtralExperts", "silu", "concatenated"),
        ("olmoe", "OlmoeExperts", "silu", "concatenated"),
        ("glm4_moe", "Glm4MoeExperts", "silu", "concatenated"),
        ("granitemoe", "GraniteMoeExperts", "silu", "concatenated"),
    ],
)
def test_gates_are_recognised(model, name, kind, layout):
    experts_class(model, name)  # skips what the installed transformers lacks
    module = build(model, name)
    gate = gate_of(module)
    assert (gate.kind, gate.layout) == (kind, layout)
    if "clamped" in kind or "limited" in kind:
        assert gate.limit == module.limit
    if kind == "clamped_swiglu":
        assert gate.alpha == getattr(module, "alpha", None) or gate.alpha == module.swiglu_alpha


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "Mixtral", "DeepseekV3"])
def test_a_whole_model_has_the_loss_and_gradients_of_stock(family):
    model, ids = tiny_causal_lm(family, torch.float64), torch.randint(97, (2, 13))

    def loss_and_gradients():
        loss = model(input_ids=ids, labels=ids).loss
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {"loss": loss.detach(), **dict(zip(parameters, grads, strict=True))}

    stock = loss_and_gradients()
    with apply(model, {"moe": "on", "packing": "off"}) as run:
        ours = loss_and_gradients()
    assert run.report.features["moe"].enabled and any("2 layers" in one for one in run.report.features["moe"].changes)
    assert ours.keys() == stock.keys() and stock["loss"].isfinite()
    for name, expected in stock.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            assert_close(ours[name], expected, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
