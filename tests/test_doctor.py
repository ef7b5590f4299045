"""``fastft doctor``: the decision that a run would make, from a config alone."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import make_trainer, tiny_model

from fastft_plugins import apply
from fastft_plugins.cli import main
from fastft_plugins.cli.doctor import examine
from fastft_plugins.cli.meta_model import read_config
from fastft_plugins.manager import PluginManager
from fastft_plugins.shapes import SHAPES


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plugin_manager: PluginManager) -> Any:
    """Call the command in this process; returns exit code, output and errors."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastft", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize("overrides", [{}, {"attention_dropout": 0.1}, {"rope_parameters": {"rope_type": "dynamic"}}])
def test_the_decision_is_a_runs_own(overrides: dict[str, Any], plugin_manager: PluginManager) -> None:
    if "rope_parameters" in overrides:
        overrides["rope_parameters"] |= {"factor": 2.0, "rope_theta": 10000.0}
    # As the doctor takes it: on the machine's GPU if there is one, with checkpointing switched on.
    model = tiny_model(**overrides).to("cuda" if torch.cuda.is_available() else "cpu")
    model.gradient_checkpointing_enable()
    found = examine("tiny", model.config)
    with apply(model) as run:
        decided = {name: (entry.enabled, entry.reason) for name, entry in run.report.features.items()}
    del decided["bookkeeping"]  # a Trainer's run decides it
    shown = {name: (each["enabled"], each["reason"]) for name, each in found["features"].items()}
    assert shown.pop("bookkeeping")[0] and shown == decided
    assert found["features"]["packing"]["enabled"] is not bool(overrides)
    assert found["dry_run"].startswith("not needed" if overrides else "passed")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_decided_without_its_memory(shape: str, plugin_manager: PluginManager) -> None:
    found = examine(*read_config(None, shape))
    assert found["dry_run"].startswith("passed")
    (kernel, *others) = found["features"]["packing"]["kernels"]
    assert "shapes only" not in kernel and not others
    assert "fastft doctor" not in [status.name for status in plugin_manager.statuses]


def test_checkpointing_where_there_is_memory_to_copy_to(
    plugin_manager: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastft_plugins.kernels.transfer.why_no_transfer", lambda device: None)
    found = examine(*read_config(None, "tiny-qwen3"))
    checkpointing = found["features"]["checkpointing"]
    assert checkpointing["enabled"] and "1.15x to 1.40x" in checkpointing["expected_gain"]
    assert found["dry_run"].startswith("passed")


@pytest.mark.gpu
def test_experts_on_a_gpu(plugin_manager: PluginManager) -> None:
    found = examine(*read_config(None, "qwen3-30b-a3b"))["features"]
    assert found["moe"]["enabled"] and "gate_up_proj: " in found["moe"]["kernels"][0]
    assert found["packing"]["kernels"] == ["flash varlen"]


def test_a_folder_and_its_config(doctor: Any, tmp_path: Any) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    code, text, _ = doctor(tmp_path)
    assert code == 0
    assert "packing: on" in text and "dry run passed" in text and "moe: off" in text
    code, text, _ = doctor(tmp_path / "config.json", "--json")
    found = json.loads(text)
    assert code == 0
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["features"]["moe"]["expected_gain"].startswith("none")


def test_bookkeeping_is_shown_as_a_trainers_run_has_it(doctor: Any, tmp_path: Any) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path / "model")
    with apply(make_trainer(tmp_path, model)) as run:
        decided = run.report.features["bookkeeping"]
    assert decided.enabled
    text = " ".join(doctor(tmp_path / "model")[1].split())
    found = json.loads(doctor(tmp_path / "model", "--json")[1])
    row = found["features"]["bookkeeping"]
    assert row["enabled"] and f"bookkeeping: on why {row['reason']}" in text
    assert row["reason"].startswith("with transformers' Trainer") and decided.reason in row["reason"]
    assert "off with Lightning and in a loop of your own" in row["reason"] and "3.4 ms" in row["expected_gain"]
    assert not any("bookkeeping" in note for note in found["notes"])


def test_bookkeeping_that_a_trainers_run_would_not_have(
    doctor: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.models.llama.modeling_llama.LlamaMLP
    monkeypatch.setattr(kind, "children", lambda self: iter(()), raising=False)
    tiny_model().config.save_pretrained(tmp_path)
    row = json.loads(doctor(tmp_path, "--json")[1])["features"]["bookkeeping"]
    assert not row["enabled"] and "has its own way to walk" in row["reason"]


def test_the_number_of_parameters(doctor: Any, tmp_path: Any) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000} | sizes))
    assert "), 139,648 parameters" in doctor("--shape", "tiny-qwen3")[1]
    assert "), 17.04 million parameters" in doctor(tmp_path)[1]
    assert "), 1.24 billion parameters" in doctor("--shape", "llama-1b")[1]


def test_quantisation_is_left_out_and_said(doctor: Any, tmp_path: Any) -> None:
    config = tiny_model().config
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    code, text, _ = doctor(tmp_path)
    assert code == 0 and "as if the weights were not quantised" in " ".join(text.split())


def test_a_model_that_is_no_language_model(doctor: Any, tmp_path: Any) -> None:
    transformers.ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    code, text, _ = doctor(tmp_path)
    assert code == 0
    assert "packing: off" in text and "is no causal language model" in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot read this config"),
        ('{"model_type": "nope"}', "does not recognize this architecture"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "transformers cannot"),
        ('{"model_type": "foo", "auto_map": {"AutoConfig": "own.Config"}}', "without code of its own"),
    ],
)
def test_a_config_that_cannot_be_used(doctor: Any, tmp_path: Any, content: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(content)
    code, text, errors = doctor(tmp_path)
    assert code == 1 and not text
    assert str(tmp_path) in errors and problem in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("content", "problem", "remedy"),
    [
        (
            '{"model_type": "llama", "hidden_size": "big"}',
            "field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str (value: 'big')).",
            "mend hidden_size in this file; its model type, llama, is known",
        ),
        (
            '{"model_type": "llama", "hidden_size": 33}',
            "ValueError: The hidden size (33) is not a multiple of the number of attention heads (32).).",
            "mend its values in this file; its model type, llama, is known",
        ),
        ('{"model_type": "nope"}', "model type `nope`", "a config of a model type that the installed"),
        ('{"model_type": []}', "", "a config of a model type that the installed"),
        ("[]", "Unrecognized model", "a config of a model type that the installed"),
        ("{", "not a valid JSON file", "a config.json as save_pretrained() writes it"),
        (json.dumps({"model_type": "llama", "hidden_size": "big" * 999}), "...).", "mend hidden_size"),
    ],
)
def test_the_remedy_for_a_config_fits(doctor: Any, tmp_path: Any, content: str, problem: str, remedy: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    code, _, errors = doctor(tmp_path)
    assert code == 1 and errors.count("\n") == 1
    reason, shown = errors.split(" Remedy: ")
    assert problem in reason and shown.startswith(remedy)
    assert len(reason) - len(str(file)) < 360  # 300 of them are transformers'


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere"], "nowhere: no such folder or file"),
        (["--shape", "qwen3-14"], "--shape qwen3-14: is not known; allowed: llama-1b"),
        ([], "give one of the two: a model's folder or config.json, or --shape NAME"),
        (["x", "--shape", "llama-1b"], "give one of the two"),
    ],
)
def test_a_mistake_in_the_arguments(doctor: Any, arguments: list[str], problem: str) -> None:
    code, _, errors = doctor(*arguments)
    assert code == 1
    assert problem in errors


def test_a_dry_run_that_fails(doctor: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no\nluck")

    tiny_model().config.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", fail)
    code, text, _ = doctor(tmp_path)
    assert code == 3
    assert "failed: RuntimeError: no luck" in " ".join(text.split())
