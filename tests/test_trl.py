"""``fastft=True`` in TRL's configs: stock trainers obey it, train the same, and keep their own metrics."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import pickle
import runpy
import subprocess
import sys

import pytest
import torch
import transformers
import trl
import trl_helpers
from hf_helpers import documents, losses, make_trainer, tiny_model
from moe_helpers import tiny_causal_lm
from packaging.version import Version
from torch.testing import assert_close
from transformers import AttentionInterface, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS
from trl_helpers import arguments, completions, conversations, sft_trainer, tokenizer, tokens

import fastft_trl
from fastft_plugins import FastFTCallback, FastFTConfigError, FastFTError
from fastft_plugins.run import active_run
from fastft_trl.flag import FlagCallback

CONFIGS = ["SFTConfig", "DPOConfig", "GRPOConfig", "KTOConfig", "RewardConfig"]
METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")


def logged(trainer):
    return [{name: entry[name] for name in METRICS} for entry in trainer.state.log_history if "loss" in entry]


def compare(tmp_path, make, **options):
    """Train twice, without and with the flag; returns the report."""
    stock = make(tmp_path, **options)
    stock.train()  # before the other is made: making a trainer sets the seeds
    ours = make(tmp_path, fastft=True, **options)
    ours.train()
    assert_close(losses(ours), losses(stock), rtol=2e-6, atol=2e-6)
    assert_close(dict(ours.model.state_dict()), dict(stock.model.state_dict()), rtol=0, atol=2e-6)
    assert losses(stock) and type(ours).__module__.startswith("trl.")
    return stock, ours, fastft_trl.report_of(ours)


SFT = {
    "padded": (tokens, {}),
    "padded to a multiple": (tokens, {"pad_to_multiple_of": 8}),
    "bfd": (tokens, {"packing": True, "packing_strategy": "bfd"}),
    "bfd_split": (tokens, {"packing": True, "packing_strategy": "bfd_split", "max_length": 16}),
    "wrapped": (tokens, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "padding-free": (tokens, {"padding_free": True, "max_length": None}),
    "padding-free to a multiple": (tokens, {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}),
    "bfd to a multiple": (tokens, {"packing": True, "pad_to_multiple_of": 16}),
    "completion only": (completions, {"completion_only_loss": True}),
    "completion only, packed": (completions, {"completion_only_loss": True, "packing": True}),
    "assistant only": (conversations, {"assistant_only_loss": True}),
    "assistant only, packed": (conversations, {"assistant_only_loss": True, "packing": True}),
    "dft loss": (tokens, {"loss_type": "dft"}),
    "accumulation": (tokens, {"gradient_accumulation_steps": 3}),
    "checkpointing": (tokens, {"gradient_checkpointing": True}),
    "workers": (tokens, {"dataloader_num_workers": 1}),
}


@pytest.mark.parametrize("case", SFT)
def test_sft(tmp_path, case):
    data, options = SFT[case]
    if case == "dft loss" and Version(trl.__version__) < Version("1.15"):
        pytest.skip("this TRL hands the loss to the Trainer as compute_loss_func, with which packing stays off")

    def make(folder, **more):
        return sft_trainer(folder, data(), **options, **more)

    stock, ours, report = compare(tmp_path, make, fastft_config={"packing": "on"})
    assert_close(logged(ours), logged(stock), rtol=2e-5, atol=2e-5)
    metrics = report.features["packing"].metrics
    assert metrics["packed_batches"] == 5 * options.get("gradient_accumulation_steps", 1)
    assert "unpacked_batches" not in metrics and report.state == "finished"


def test_filling_tokens_are_one_document_and_cost_no_router_its_balance(tmp_path):
    """The auxiliary loss counts every token's experts, those of the filling included."""

    def make(folder, **more):
        options = {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64, "gradient_checkpointing": False}
        return trl.SFTTrainer(
            tiny_causal_lm(output_router_logits=True, router_aux_loss_coef=0.3),
            fastft_trl.SFTConfig(**arguments(folder, **options, **more)),
            train_dataset=tokens(),
            processing_class=tokenizer(),
        )

    stock, ours, report = compare(tmp_path, make, fastft_config={"packing": "on"})
    assert [entry["aux_loss"] for entry in ours.state.log_history if "loss" in entry] == pytest.approx(
        [entry["aux_loss"] for entry in stock.state.log_history if "loss" in entry], rel=1e-5
    )
    metrics = report.features["packing"].metrics
    assert metrics["documents"] <= 5 * (4 + 1) and metrics["tokens"] % 64 == 0


def test_sft_with_liger(tmp_path):
    pytest.importorskip("liger_kernel")
    compare(tmp_path, lambda folder, **more: sft_trainer(folder, tokens(), use_liger_kernel=True, **more))


@pytest.mark.parametrize("name", ["dpo", "grpo", "kto", "reward"])
def test_trainers_that_cannot_pack_train_stock_and_say_why(tmp_path, name, caplog):
    make = getattr(trl_helpers, f"{name}_trainer")
    with caplog.at_level(logging.WARNING, logger="fastft"):
        stock, ours, report = compare(tmp_path, make)
    assert losses(ours) == losses(stock)
    packing = report.features["packing"]
    assert not packing.enabled and f"{type(ours).__name__} trains on padded batches" in packing.reason
    assert len([record for record in caplog.records if record.name == "fastft" and "packing" in record.message]) == 1


def test_what_cannot_be_on_raises_before_the_first_step(tmp_path):
    trainer = trl_helpers.dpo_trainer(tmp_path, fastft=True, fastft_config={"packing": "on"})
    with pytest.raises(FastFTError, match="compares whole sequences"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_trls_with_two_more_fields(tmp_path, name):
    stock, ours = getattr(trl, name), getattr(fastft_trl, name)
    config = ours(str(tmp_path), use_cpu=True, fastft=True, fastft_config={"packing": "on"})
    assert isinstance(config, stock)
    plain = stock(str(tmp_path), use_cpu=True).to_dict()
    assert set(config.to_dict()) == set(plain) | {"fastft", "fastft_config"}
    unpickled = pickle.loads(pickle.dumps(config))
    assert type(unpickled) is stock, "a saved training_args.bin must not need this project"
    assert unpickled.fastft is True and unpickled.fastft_config == {"packing": "on"}


@pytest.mark.parametrize(
    ("value", "message"),
    [({"pakking": "on"}, "packing"), ({"packing": "sometimes"}, "sometimes"), ("{packing", "not valid JSON")],
)
def test_a_bad_config_raises_when_it_is_built(tmp_path, value, message):
    with pytest.raises(FastFTConfigError, match=message):
        fastft_trl.SFTConfig(str(tmp_path), use_cpu=True, fastft=True, fastft_config=value)


def test_without_trl_the_import_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fastft-plugins\[trl\]'"):
        fastft_trl.SFTConfig  # noqa: B018


def test_settings_without_the_flag_are_reported_as_ignored(tmp_path, caplog):
    fastft_trl.SFTConfig(str(tmp_path), use_cpu=True, fastft_config={"packing": "on"})
    assert "ignored" in caplog.text


def test_importing_and_configs_without_the_flag_change_nothing(tmp_path):
    if FlagCallback in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.remove(FlagCallback)
    before = list(DEFAULT_CALLBACKS)
    importlib.reload(importlib.import_module("fastft_trl.configs"))
    fastft_trl.SFTConfig(str(tmp_path), use_cpu=True)
    assert DEFAULT_CALLBACKS == before
    fastft_trl.SFTConfig(str(tmp_path), use_cpu=True, fastft=True)
    fastft_trl.DPOConfig(str(tmp_path), use_cpu=True, fastft=True)
    assert [*before, FlagCallback] == DEFAULT_CALLBACKS


def test_other_trainers_of_the_process_stay_stock(tmp_path):
    fastft_trl.SFTConfig(str(tmp_path), use_cpu=True, fastft=True)
    plain = make_trainer(tmp_path, tiny_model())
    (callback,) = [one for one in plain.callback_handler.callbacks if isinstance(one, FlagCallback)]
    plain.train()
    assert callback.report.state == "not started" and active_run(plain.model) is None
    with pytest.raises(ValueError, match="fastft=True"):
        fastft_trl.report_of(plain)


class Fail(TrainerCallback):
    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        raise self.error


@pytest.mark.parametrize("event", ["on_train_begin", "on_epoch_begin", "on_step_end", "on_log", "on_train_end"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_a_failed_run_leaves_nothing(tmp_path, event, error):
    trainers = []
    for flag in (False, True):
        trainer = sft_trainer(tmp_path, tokens(), callbacks=[Fail(event, error)], fastft=flag)
        with pytest.raises(type(error)):
            trainer.train()
        trainers.append(trainer)
    stock, ours = trainers
    assert active_run(ours.model) is None and "fastft" not in AttentionInterface._global_mapping
    assert vars(ours).keys() == vars(stock).keys()
    assert vars(ours.callback_handler).keys() == vars(stock.callback_handler).keys()
    for (name, mine), theirs in zip(ours.model.named_modules(), stock.model.modules(), strict=True):
        assert vars(mine).keys() == vars(theirs).keys(), name
        assert len(mine._forward_pre_hooks) == len(theirs._forward_pre_hooks), name
    assert len({id(one.config) for one in ours.model.modules() if hasattr(one, "config")}) == 1


def test_the_flag_and_a_callback_start_one_run(tmp_path):
    callback = FastFTCallback()
    trainer = sft_trainer(tmp_path, tokens(), callbacks=[callback], fastft=True)
    trainer.train()
    assert callback.report is fastft_trl.report_of(trainer)
    assert callback.report.features["packing"].metrics["packed_batches"] == 5


def write_inputs(folder, **settings):
    """A model, a tokenizer, data and a YAML file, as `trl sft` takes them."""
    tiny_model("qwen3").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rows = [json.dumps({"text": trl_helpers.text(row)}) for row in documents(24)]
    (folder / "data" / "train.jsonl").write_text("\n".join(rows))
    settings = {
        "model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", "max_steps": 3, "use_cpu": True,
        "bf16": False, "optim": "sgd", "learning_rate": 0.05, "logging_steps": 1, "report_to": "none",
        "dtype": "float32", **settings,
    }  # fmt: skip
    (folder / "sft.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()))


def test_yaml_and_command_line(tmp_path):
    write_inputs(tmp_path, fastft=True, fastft_config={"packing": True, "moe": "off"})
    parser = trl.TrlParser((fastft_trl.SFTConfig, trl.ModelConfig))
    yaml = ["--config", str(tmp_path / "sft.yaml"), "--output_dir", str(tmp_path / "out")]
    (from_yaml, _) = parser.parse_args_and_config(yaml, fail_with_unknown_args=False)
    assert from_yaml.fastft is True and from_yaml.fastft_config == {"packing": True, "moe": "off"}
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--fastft", "--fastft_config", '{"packing": "off"}']
    (from_flags, _) = trl.TrlParser((fastft_trl.SFTConfig, trl.ModelConfig)).parse_args_and_config(flags)
    assert from_flags.fastft is True and from_flags.fastft_config == {"packing": "off"}


def test_the_launchable_module_does_what_trl_sft_does(tmp_path, monkeypatch):
    """As ``python -m fastft_trl.sft`` in this process, and through ``accelerate launch`` in others."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    ends = {}
    commands = {
        "trl": ("trl.scripts.sft",),
        "ours": ("fastft_trl.sft", "--fastft", "--fastft_config", '{"packing": "on"}'),
        "accelerate": ("accelerate.commands.launch", "--cpu", "-m", "fastft_trl.sft", "--fastft"),
    }
    for name, (module, *more) in commands.items():
        arguments = [*more, "--config", "sft.yaml", "--output_dir", name]
        if name == "accelerate":
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=True)
        else:
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            runpy.run_module(module, run_name="__main__")
        state = json.loads((tmp_path / name / "checkpoint-3" / "trainer_state.json").read_text())
        ends[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ends[name].append(float(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).norm()))
    assert len(ends["trl"]) == 4
    assert_close(ends["ours"], ends["trl"], rtol=2e-6, atol=2e-6)
    assert_close(ends["accelerate"], ends["trl"], rtol=2e-6, atol=2e-6)
