"""``python -m fastft_trl.sft``: a user's mistake is one message with the remedy, and the report comes at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import trl.scripts.sft
from test_trl import write_inputs
from transformers import Trainer
from transformers.trainer import DEFAULT_CALLBACKS

from fastft_trl import sft
from fastft_trl.flag import FlagCallback

REPORT = "fastft: Qwen3ForCausalLM, transformers, finished"


def fails(monkeypatch, capsys, *arguments):
    """Run the command up to where it fails; returns the message."""
    started = []
    monkeypatch.setattr(trl.scripts.sft, "main", lambda *configs: started.append(configs))
    monkeypatch.setattr(sys, "argv", ["sft", *arguments])
    with pytest.raises(SystemExit) as caught:
        sft.main()
    assert caught.value.code == 2 and not started, "refused before anything is loaded"
    printed = capsys.readouterr().err
    assert printed.count("fastft_trl.sft: ") == 1 and "Traceback" not in printed
    return printed.split("fastft_trl.sft: ")[1]


def command(folder, *arguments, **variables):
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("fastfft: true", ["sft.yaml: ", "unknown field 'fastfft' (value True)", "did you mean 'fastft'"]),
        ("sead: 1", ["unknown field 'sead' (value 1)", "'seed'"]),
        ("sead: 1\nfastfft: true", ["'sead' (value 1)", "'fastfft' (value True)"]),
        ("help: true", ["unknown field 'help'"]),
        ("num_processes: 4", ["'num_processes' (value 4)", "accelerate launch --num_processes 4 -m fastft_trl.sft"]),
        ("accelerate_config: zero3", ["accelerate launch --config_file zero3"]),
        ("datasets: [{path: data, splitt: train}]", ["field of 'datasets' 'splitt' (value 'train')", "'split'"]),
        ('fastft_config: {pakcing: "on"}', ["fastft_config: ", "'pakcing' (value 'on')", "'packing'", "sft.yaml"]),
        ("fastft_config: {packing: maybe}", ["packing='maybe' is not allowed; allowed: 'auto', 'on', 'off'"]),
        ("fastft_config: foo", ["fastft_config='foo'", 'allowed: an object such as {"packing": "on"}']),
        ("fastft_config: [1]", ["fastft_config: the settings must be a mapping", "[1]"]),
        ("max_steps: many", ["--max_steps", "invalid int value: 'many'", "sft.yaml"]),
        ("fastft: perhaps", ["--fastft", "perhaps", "yes/no"]),
        ("seed: 1\nfastft: [", ["--config", "not valid YAML", "sft.yaml, line 2"]),
        ("", ["sft.yaml", "must contain a YAML mapping"]),
        ("env: 3", ["`env` field should be a dict", "sft.yaml"]),
    ],
)
def test_a_wrong_file_is_one_message(tmp_path, monkeypatch, capsys, text, named):
    file = tmp_path / "sft.yaml"
    file.write_text(text)
    message = fails(monkeypatch, capsys, "--config", str(file), "--output_dir", str(tmp_path), "--use_cpu")
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config", "missing.yaml"], ["--config", "missing.yaml", "No such file"]),
        (["--config=missing.yaml"], ["missing.yaml (No such file"]),
        (["--config", "."], ["cannot read the config file .", "directory"]),
        (["--config"], ["--config has no value", "--config sft.yaml"]),
        (["--sead", "1"], ["'--sead 1'", "'--seed'"]),
        (["--fastft_config", "foo"], ["fastft_config='foo'", '{"packing": "on"}']),
        (["--max_steps", "many"], ["invalid int value: 'many'"]),
    ],
)
def test_a_wrong_command_line_is_one_message(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    message = fails(monkeypatch, capsys, "--output_dir", "out", "--use_cpu", *arguments)
    for part in named:
        assert part in message


def test_every_field_that_trl_takes_is_allowed(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(trl.scripts.sft, "main", lambda *configs: given.extend(configs))
    file = tmp_path / "sft.yaml"
    file.write_text(
        "env: {OF_THE_FILE: 1}\ndatasets: [{path: data, columns: [text]}]\nstreaming: true\nlora_r: 4\nseed: 5\n"
        "use_cpu: true\nfastft: false\ndataset_train_split: train"
    )
    monkeypatch.setenv("OF_THE_FILE", "0")  # restored afterwards
    monkeypatch.setattr(sys, "argv", ["sft", "--config", str(file), "--output_dir", str(tmp_path)])
    sft.main()
    script, training, model, mixture = given
    assert os.environ["OF_THE_FILE"] == "1" and script.dataset_train_split == "train"
    assert training.seed == 5 and training.fastft is False and model.lora_r == 4
    assert mixture.streaming and mixture.datasets[0].columns == ["text"]


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(2, "a bug", "data")])
def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch, error):
    def fail(*configs):
        raise error

    monkeypatch.setattr(trl.scripts.sft, "main", fail)
    monkeypatch.setattr(sys, "argv", ["sft", "--output_dir", str(tmp_path), "--use_cpu", "--fastft"])
    with pytest.raises(type(error), match="a bug"):
        sft.main()
    assert DEFAULT_CALLBACKS.count(FlagCallback) == 1, "what was there before"


def test_a_feature_that_cannot_be_on_is_one_message(tmp_path):
    write_inputs(tmp_path, fastft=True, fastft_config={"checkpointing": "on"}, gradient_checkpointing=False)
    done = command(tmp_path, "-m", "fastft_trl.sft", "--config", "sft.yaml")
    assert done.returncode == 2, done.stderr
    assert "fastft_trl.sft: " in done.stderr and "Traceback" not in done.stderr


def test_the_report_is_printed_once_and_only_with_the_flag(tmp_path):
    write_inputs(tmp_path)
    stock = command(tmp_path, "-m", "fastft_trl.sft", "--config", "sft.yaml")
    assert stock.returncode == 0 and REPORT not in stock.stderr
    ours = command(tmp_path, "-m", "fastft_trl.sft", "--config", "sft.yaml", "--fastft")
    assert ours.returncode == 0 and ours.stderr.count(REPORT) == 1, ours.stderr


def test_under_fastft_run_it_is_printed_once_as_well(tmp_path):
    write_inputs(tmp_path, fastft=True)
    run = ["-m", "fastft_plugins", "run", "--report", "report.json", "python"]
    done = command(tmp_path, *run, "-m", "fastft_trl.sft", "--config", "sft.yaml")
    assert done.returncode == 0 and done.stderr.count(REPORT) == 1, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("is_first", [True, False])
def test_of_several_processes_the_first_prints(tmp_path, monkeypatch, capsys, is_first):
    """Without other processes: torch now and then deadlocks on its GIL as it takes a gloo group down."""
    write_inputs(tmp_path, fastft=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda trainer: is_first)
    monkeypatch.setattr(sys, "argv", ["sft", "--config", "sft.yaml"])
    sft.main()
    assert capsys.readouterr().err.count(REPORT) == is_first
