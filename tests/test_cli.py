"""The command line: what users type and what they see, errors included."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_helpers import save_tiny_model
from rich.console import Console

from fastft_plugins.cli import main
from fastft_plugins.cli.plugins import table
from fastft_plugins.manager import PluginManager, PluginStatus
from fastft_plugins.report import FeatureReport, Report


@pytest.fixture
def fastft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command line in this process; returns exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastft", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def test_help_imports_no_framework() -> None:
    program = (
        "import sys; from fastft_plugins.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("run", "doctor", "env", "plugins", "report", "bench", "demo"))


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastft_plugins", "report", "nowhere.json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastft: nowhere.json: cannot be read")
    assert "Traceback" not in done.stderr


def test_env(fastft: Any, plugin_manager: PluginManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_TRACE", "0")
    code, text, _ = fastft("env")
    assert code == 0
    assert "torch" in text and "FASTFT_TRACE" in text and "built-in" in text
    found = json.loads(fastft("env", "--json")[1])
    assert found["packages"]["torch"] and found["packages"]["python"]
    assert {"fastft-plugins", "triton", "transformers", "trl", "lightning", "peft"} <= found["packages"].keys()
    assert found["variables"]["FASTFT_TRACE"] == "0"
    assert "loaded" in {plugin["state"] for plugin in found["plugins"]}


def test_plugins(fastft: Any, plugin_manager: PluginManager) -> None:
    code, text, _ = fastft("plugins")
    assert code == 0
    for status in plugin_manager.statuses:
        assert status.name in text and status.state in text
        assert all(hook in text for hook in status.hooks)


def test_a_failed_plugin_shows_its_error() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table([PluginStatus("broken", "some-package", "1.0", "failed", "ImportError: no [module] x")]))
    text = console.export_text()
    assert "broken" in text and "failed" in text and "no [module] x" in text


def test_report_shows_a_saved_report(fastft: Any, tmp_path: Path) -> None:
    saved = Report({"packing": FeatureReport("packing", True, "because")}, model="Tiny")
    file = tmp_path / "report.json"
    file.write_text(json.dumps(saved.to_dict()))
    code, text, _ = fastft("report", file)
    assert code == 0
    assert text.strip() == str(saved).strip()


def test_report_draws_what_was_measured(fastft: Any, tmp_path: Path) -> None:
    packing = FeatureReport("packing", True, "because", metrics={"tokens": 70, "padding_removed": 30})
    history = [{"step": 1, "padding_share": 0.2}, {"step": 2, "padding_share": 0.4, "peak_memory_gib": 3.0}]
    file = tmp_path / "report.json"
    file.write_text(json.dumps(Report({"packing": packing}, history=history).to_dict()))
    code, _, errors = fastft("report", file)
    assert code == 0 and errors == f"saved {tmp_path / 'report.png'}\n"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("obstacle", ["nothing measured", "no matplotlib", "not writable"])
def test_a_report_without_a_plot_says_why(
    fastft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    metrics = {} if obstacle == "nothing measured" else {"tokens": 70.0}
    file = tmp_path / "report.json"
    file.write_text(json.dumps(Report({"packing": FeatureReport("packing", metrics=metrics)}).to_dict()))
    if obstacle == "no matplotlib":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if obstacle == "not writable":
        (tmp_path / "report.png").mkdir()
    code, text, errors = fastft("report", file)
    assert code == 0 and "packing" in text
    reasons = {
        "nothing measured": "has measured nothing",
        "no matplotlib": "pip install 'fastft-plugins[demo]'",
        "not writable": "report.png cannot be written",
    }
    assert errors.startswith("fastft: no plot, ") and reasons[obstacle] in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{\n'a'", "line 2: not valid JSON"),
        ("[]", "a JSON list, not an object"),
        ("{}", "not a saved fastft report"),
        ('{"kind": "fastft demo"}', "not complete (model is missing)"),
        ('{"features": {"packing": {"name": "packing", "reason": null}}}', "features.packing.reason is None, not text"),
        ('{"features": {}, "model": "\\ud800"}', "not a text file"),
        ('{"features": {}, "model": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("\udcff", "not a text file"),
    ],
)
def test_report_of_another_file(fastft: Any, tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    code, _, errors = fastft("report", file)
    assert code == 2
    assert str(file) in errors and problem in errors and "Remedy: " in errors
    assert "fastft run --report FILE" in errors


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_demo_end_to_end(fastft: Any, tmp_path: Path, plugin_manager: PluginManager, trainable: str) -> None:
    data = tmp_path / "data.jsonl"
    with data.open("w") as lines:
        for length in (1, 9, 2, 30, 4, 3):
            lines.write(json.dumps({"prompt": "add one two", "completion": "return a + " * length}) + "\n")
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    options = ["--batch-size", 3, "--steps", 4, "--max-length", 64, "--trainable", trainable, "--out", out]
    code, text, errors = fastft("demo", "--model", model, "--data", data, *options)
    assert code == 0, errors
    assert "real tokens/s" in text and "packing" in text
    words = " ".join(text.replace("│", " ").split())
    assert words.count("6 usable records, repeated until there are 12") == 2  # while it runs, and with the result

    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "report.json").read_text())
    assert len(saved["stock"]["losses"]) == len(saved["fastft"]["step_seconds"]) == 4
    assert saved["real_tokens"][:2] == saved["real_tokens"][2:]  # six records, twice
    assert 0.3 < saved["padding_share"] < 0.9
    assert saved["largest_relative_loss_difference"] < 1e-4
    assert saved["stock"]["losses"][0] != saved["stock"]["losses"][2]  # it did learn something
    assert saved["weight_difference_over_update"] < 0.05
    assert saved["stock"]["peak_memory_bytes"] > 0
    assert len(saved["stock"]["step_cpu_seconds"]) == 4 and saved["fastft"]["cpu_seconds"] > 0
    assert saved["fastft_report"]["features"]["packing"]["enabled"]
    assert saved["settings"]["trainable"] == trainable

    code, again, _ = fastft("report", out / "report.json")
    assert code == 0
    assert again.strip() in text and (out / "report.png").exists()


def test_demo_errors_come_before_any_training(fastft: Any, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n{"txt": "typo"}\n')
    taken = tmp_path / "taken"
    (taken / "plot.png").mkdir(parents=True)
    for options, problem in (
        (["--data", file], f"{file}, line 2: the record has no text"),
        (["--data", tmp_path / "none.jsonl"], "no such file"),
        (["--model", tmp_path], f"{tmp_path}: no config.json here"),
        (["--model", tmp_path / "nomodel"], "nomodel: no such folder"),
        (["--steps", 0], "--steps 0: must be at least 1"),
        (["--batch-size", 0], "--batch-size 0: must be at least 1"),
        (["--max-length", 1], "--max-length 1: must be at least 2"),
        (["--seed", -1], "--seed -1: must be at least 0"),
        (["--seed", 2**32], "--seed 4294967296: must be at most"),
        (["--trainable", "qlora"], "allowed: 'lora', 'full'"),
        (["--out", file], "cannot be created"),
        (["--out", "/proc"], "/proc/report.json: cannot be written"),
        (["--out", taken], "plot.png: cannot be written (Is a directory)"),
    ):
        code, _, errors = fastft("demo", *(["--out", tmp_path / "out"] if "--out" not in options else []), *options)
        assert code == 2, problem
        assert problem in errors
        assert errors.startswith("fastft: ") and errors.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert [path.name for path in taken.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("broken", ["config", "hidden_size", "weights"])
def test_a_model_folder_that_cannot_be_loaded(
    fastft: Any, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model")
    capsys.readouterr()  # transformers' progress bar
    config, weights = model / "config.json", model / "model.safetensors"
    if broken == "weights":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        values = json.loads(config.read_text()) | {"hidden_size": "x"}
        config.write_text("{}" if broken == "config" else json.dumps(values))
    code, _, errors = fastft("demo", "--model", model, "--out", tmp_path / "out")
    assert code == 2
    assert f"{model}: transformers cannot load" in errors and "Remedy: " in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_version(fastft: Any) -> None:
    code, text, _ = fastft("--version")
    assert code == 0
    assert text.startswith("fastft-plugins") and len(text.splitlines()) == 1


def test_a_disabled_plugin_says_what_switched_it_off() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table([PluginStatus("hf", "some-package", "1.0", "disabled")]))
    assert "switched off by FASTFT_PLUGINS" in console.export_text()


@pytest.mark.parametrize("command", ["plugins", "env"])
def test_a_strict_failure_is_one_line(
    fastft: Any, plugin_manager: PluginManager, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def fail() -> Any:
        raise RuntimeError("no\nluck")

    monkeypatch.setenv("FASTFT_STRICT_PLUGINS", "1")
    monkeypatch.setattr("fastft_plugins.manager._candidates", lambda: [(PluginStatus("x", "their-package"), fail)])
    code, _, errors = fastft(command)
    assert code == 2
    assert errors == "fastft: plugin 'x' (their-package) failed to load: RuntimeError: no luck\n"


def test_the_report_fits_the_terminal(fastft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(Report({"packing": FeatureReport("packing", True, "because " * 30)}).to_dict()))
    monkeypatch.setenv("COLUMNS", "80")
    _, text, _ = fastft("report", file)
    assert max(map(len, text.splitlines())) <= 80


def test_bench_is_the_benchmarks_of_the_repository(tmp_path: Path) -> None:
    def fastft_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastft_plugins", "bench", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)},
        )

    shown = fastft_bench("--help")
    assert shown.returncode == 0 and "--stacks" in shown.stdout, shown.stderr
    wrong = fastft_bench("--smoke", "--shape", "llama-2b")
    assert wrong.returncode == 2 and "llama-1b" in wrong.stderr and "Traceback" not in wrong.stderr


def test_bench_says_what_it_lacks(fastft: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = fastft("bench", "--shape", "llama-1b")
    assert code == 2 and "--smoke" in errors and "GPU" in errors
    monkeypatch.setattr("fastft_plugins.cli.bench._REPOSITORY", tmp_path)
    code, _, errors = fastft("bench", "--smoke")
    assert code == 2 and "clone" in errors and str(tmp_path) in errors
