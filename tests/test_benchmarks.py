"""The benchmark harness: documents, summaries, and a smoke run of real processes."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import weakref
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the benchmarks train with transformers' Trainer")

from simulated_device import SimulatedDevice

from benchmarks import run as cli
from benchmarks import table, weights, worker
from benchmarks.documents import TOLERANCE, describe, make_steps, parse_lengths
from benchmarks.environment import git_commit
from benchmarks.settings import SMOKE, Settings
from benchmarks.sft_names import SftStack
from benchmarks.shapes import SHAPES, build_model
from benchmarks.summary import pairs_text, ratios, render, spread, summarise
from benchmarks.table import RESULTS, markdown
from fastft_plugins.checkpointing import OffloadCheckpoint

ROOT = Path(__file__).parents[1]


def benchmark(*arguments: str) -> dict[str, Any]:
    """Run `python -m benchmarks.run --smoke …` as a user would, and return the file it wrote."""
    out = arguments[arguments.index("--out") + 1]
    paths = [str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.run", "--smoke", *arguments]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    result: dict[str, Any] = json.loads(Path(out).read_text())
    assert process.returncode == 0, [run["error"] for run in result["runs"]]
    assert "tokens/s" in process.stdout
    return result


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "result.json"
    return benchmark("--stacks", "stock-padded,fastft-padded", "--repeats", "1", "--out", str(out))


def test_smoke_run_records_everything_a_reader_needs(result: dict[str, Any]) -> None:
    assert set(result) == {
        "schema", "date", "commit", "command", "one_process", "shared_caches", "settings", "documents", "environment",
        "runs", "summary", "ratios",
    }  # fmt: skip
    assert result["schema"] == cli.SCHEMA
    assert result["settings"]["shape"] == "tiny-llama"
    assert {"torch", "transformers"} <= set(result["environment"]["packages"])
    for run in result["runs"]:
        assert run["status"] == "ok" and run["error"] is None
        assert len(run["step_s"]) == len(run["tokens_per_s"]) == SMOKE["steps"]
        assert len(run["forward_s"]) == len(run["backward_s"]) == SMOKE["split_steps"]
        assert min(run["first_step_s"], *run["step_s"], *run["forward_s"], *run["backward_s"]) > 0
        assert len(run["loss"]) == Settings(**SMOKE).total_steps


def test_both_stacks_train_on_the_same_documents_with_the_same_losses(result: dict[str, Any]) -> None:
    stock, fastft = result["runs"]
    assert stock["documents_digest"] == fastft["documents_digest"] == result["documents"]["digest"]
    assert fastft["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    assert result["ratios"][0]["loss_difference"] < 1e-5
    assert fastft["report"]["features"]["packing"]["enabled"], fastft["report"]


def test_smoke_run_with_every_feature_off(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = benchmark("--stacks", "stock-packed,fastft-off", "--repeats", "1", "--out", str(out))
    stock, off = result["runs"]
    assert off["loss"] == stock["loss"]
    assert not any(feature["enabled"] for feature in off["report"]["features"].values())


def test_smoke_run_of_the_forward_and_backward_stacks(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = benchmark("--stacks", "varlen-rebuilt,fastft-model", "--repeats", "1", "--out", str(out))
    rebuilt, once = result["runs"]
    assert once["loss"] == pytest.approx(rebuilt["loss"], rel=1e-5)


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
def test_smoke_run_of_the_sft_stacks(tmp_path: Path) -> None:
    stacks = "trl-sdpa,trl-fastft,trl-fastft-off,trl-sdpa-every-2"
    options = ("--checkpointing", "on", "--repeats", "1", "--out", str(tmp_path / "result.json"))
    stock, fastft, off, every = benchmark("--stacks", stacks, *options)["runs"]
    assert len(stock["packed"]["tokens_per_step"]) == Settings(**SMOKE).total_steps
    assert max(stock["packed"]["tokens_per_step"]) > 0.9 * SMOKE["tokens"]
    assert stock["packed"] == fastft["packed"] == off["packed"] == every["packed"]
    assert off["loss"] == stock["loss"]
    assert fastft["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    assert every["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    features = fastft["report"]["features"]
    assert features["packing"]["enabled"] and not features["checkpointing"]["enabled"]
    assert stock["report"] is None


@pytest.mark.skipif(find_spec("lightning") is None, reason="needs Lightning")
@pytest.mark.skipif(
    not entry_points(group="lightning.pytorch.callbacks_factory", name="fastft"),
    reason="needs an installed fastft-plugins, through whose entry points the plugin works",
)
def test_smoke_run_of_the_lightning_stacks(tmp_path: Path) -> None:
    options = ("--accumulate", "2", "--shared-caches", "--repeats", "1", "--out", str(tmp_path / "result.json"))
    stacks = "lightning-padded,lightning-fastft-padded,lightning-fastft-off"
    stock, fastft, off = benchmark("--stacks", stacks, *options)["runs"]
    assert off["loss"] == stock["loss"]
    assert len(stock["loss"]) == Settings(**SMOKE).total_steps
    assert fastft["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    assert fastft["report"]["features"]["packing"]["enabled"], fastft["report"]
    assert len(fastft["forward_s"]) == len(fastft["backward_s"]) == SMOKE["split_steps"]


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("trl-sdpa", SftStack("sdpa")),
        ("trl-flex-liger-every-3", SftStack("flex", liger=True, every_n_layers=3)),
        ("trl-fastft-nocheckpoint", SftStack("fastft", checkpointing=False)),
        ("trl-fastft-planned-liger", SftStack("fastft-planned", liger=True)),
        ("trl-fastft-off-every-2", SftStack("fastft-off", every_n_layers=2)),
        ("trl-unsloth-nocheckpoint", SftStack("unsloth", checkpointing=False)),
    ],
)
def test_the_names_of_the_sft_stacks(name: str, stack: SftStack) -> None:
    assert SftStack.from_name(name) == stack


@pytest.mark.parametrize(
    "name", ["trl", "trl-eager", "trl-flex-planned", "trl-sdpa-every-0", "trl-sdpa-every-2-liger", "trl-unsloth-liger"]
)
def test_a_name_that_is_no_sft_stack(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SftStack.from_name(name)


def test_a_failing_stack_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_fails(stack: str, settings: Settings, shared: str | None) -> dict[str, Any]:
        if stack == "stock-packed":
            return {"status": "failed", "error": "out of memory"}
        return {"environment": {"gpu": None, "packages": {}}, **_ok(seconds=[1.0, 1.0])}

    monkeypatch.setattr(cli, "run_process", one_fails)
    out = tmp_path / "new" / "result.json"
    arguments = ["--smoke", "--stacks", "stock-padded,stock-packed,fastft-packed", "--repeats", "2", "--out", str(out)]
    assert cli.main(arguments) == 1
    result = json.loads(out.read_text())
    assert [run["status"] for run in result["runs"]] == ["ok", "failed", "ok"] * 2
    assert result["summary"]["stock-packed"] is None
    assert [row["stack"] for row in result["ratios"]] == ["fastft-packed"]


def test_a_crashing_process_is_reported_with_its_error() -> None:
    outcome = cli.run_process("no-such-stack", Settings(**SMOKE))
    assert outcome["status"] == "failed"
    assert "no-such-stack" in outcome["error"]


def test_ratios_compare_repeat_by_repeat() -> None:
    runs = [
        {"stack": "a", "repeat": 0, **_ok(seconds=[2.0, 2.0])},
        {"stack": "b", "repeat": 0, **_ok(seconds=[1.0, 1.0])},
        {"stack": "a", "repeat": 1, **_ok(seconds=[3.0, 3.0])},
        {"stack": "b", "repeat": 1, **_ok(seconds=[1.0, 1.0])},
    ]
    (row,) = ratios(runs)
    assert row["step_s"] == {"pairs": [2.0, 3.0], "median": 2.5}
    assert row["tokens_per_s"]["pairs"] == [2.0, 3.0]
    assert row["forward_s"] is None  # no such steps were run
    result = {
        "settings": Settings().__dict__,
        "documents": {"per_step": 1, "padding_share": 0.5},
        "environment": {"gpu": "GPU", "packages": {"torch": "2.11"}},
        "summary": summarise(runs),
        "ratios": [row],
        "runs": runs,
    }
    assert "b against a: tokens/s 2.50× (2.00 3.00)" in render(result)
    assert "**2.50×** (2.00, 3.00)" in markdown({"file": result})
    (turned,) = ratios(runs, reference="b")
    assert turned["stack"] == "a" and turned["step_s"]["median"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_many_pairs_are_shown_as_a_range() -> None:
    assert pairs_text([2.0, 1.0, 3.0, 4.0]) == "2.00, 1.00, 3.00, 4.00"
    assert pairs_text([2.0, 1.0, 3.0, 4.0, 2.0]) == "1.00–4.00, 5 pairs"


def test_the_table_names_files_and_skips_those_of_other_programs(
    tmp_path: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    (tmp_path / "moe.json").write_text('{"schema": 1, "cases": []}')
    (tmp_path / "sweep.json").write_text('{"schema": 1, "plans": {}}')
    (tmp_path / "products.json").write_text('{"schema": 1, "shapes": {}}')
    files = [str(tmp_path / f"{name}.json") for name in ("one", "moe", "sweep", "products", "two")]
    table.main([*files, files[0]])
    shown = capsys.readouterr()
    names = [line.split(" | ")[0].removeprefix("| ") for line in shown.out.splitlines()[4:]]
    assert names == ["one", "one", "two", "two", files[0], files[0]]  # two files of one name stay apart
    assert all(f"{name}.json: skipped" in shown.err for name in ("moe", "sweep", "products"))


def test_the_table_takes_the_committed_results() -> None:
    table.main([])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file"),
        ("{", "not valid JSON"),
        ('{"schema": 1}', "not a complete result"),
        ('{"schema": 1, "environment": null, "summary": {"a": 1}}', "not a complete result"),
        ('{"schema": 1, "cases": []}', "no result files in"),
    ],
)
def test_a_bad_file_for_the_table_ends_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, problem: str
) -> None:
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        table.main([str(file)])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert str(file) in shown and problem in shown


def test_one_process_frees_what_the_run_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self) -> None:
            self.itself = self

    left = weakref.ref(Model())
    gc.freeze()
    alive = []
    monkeypatch.setattr(cli, "measure", lambda stack, settings: alive.append(left() is not None) or {})
    cli.run_here("any", Settings(**SMOKE))
    assert alive == [False]


def test_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_BENCH_COMMIT", "abc123")
    assert git_commit() == "abc123"


def test_spread() -> None:
    assert spread([]) is None
    assert spread([4.0]) == {"p20": 4.0, "p50": 4.0, "p80": 4.0}
    assert spread([float(value) for value in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}


@pytest.mark.parametrize(
    ("name", "share_below_256"),
    [("loguniform-64-1024", 0.5), ("uniform-64-1024", (256 - 64) / (1024 - 64)), ("fixed-300", 0.0)],
)
def test_lengths_follow_their_distribution(name: str, share_below_256: float) -> None:
    lengths = [length for step in describe(make_steps(60, 8192, name, vocab_size=50))["lengths"] for length in step]
    distribution = parse_lengths(name)
    assert distribution.low <= min(lengths) and max(lengths) <= distribution.high
    below = sum(length < 256 for length in lengths) / len(lengths)
    assert below == pytest.approx(share_below_256, abs=4 * math.sqrt(0.25 / len(lengths)))


@pytest.mark.parametrize("tokens", [2048, 8192])
def test_steps_are_close_to_the_target_and_repeatable(tokens: int) -> None:
    steps = make_steps(5, tokens, "loguniform-64-1024", vocab_size=50, seed=7)
    assert steps == make_steps(5, tokens, "loguniform-64-1024", vocab_size=50, seed=7)
    assert steps != make_steps(5, tokens, "loguniform-64-1024", vocab_size=50, seed=8)
    assert len({len(step) for step in steps}) == 1
    for step in steps:
        assert sum(map(len, step)) == pytest.approx(tokens, rel=TOLERANCE)


def test_accumulated_batches_are_equal_in_size() -> None:
    assert all(len(step) % 5 == 0 for step in make_steps(3, 8192, "loguniform-64-1024", 50, accumulate=5))


@pytest.mark.parametrize("name", ["zipf-1-2", "fixed-", "uniform-9-3", "fixed-1", "loguniform-0-8"])
def test_bad_lengths_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"lengths '{name}'"):
        parse_lengths(name)


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_models_are_the_same_in_every_process_and_take_a_number_of_layers(shape: str) -> None:
    settings = Settings(**{**SMOKE, "shape": shape, "layers": 1})
    first: Any = build_model(settings)
    second = build_model(settings)
    assert len(first.model.layers) == 1
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert ours.equal(theirs)


def test_saved_weights_are_those_of_the_model_made_here(tmp_path: Path) -> None:
    settings = Settings(**{**SMOKE, "shape": "tiny-qwen3"})
    weights.save(settings, str(tmp_path))
    loaded = build_model(dataclasses.replace(settings, weights=str(tmp_path)))
    for ours, theirs in zip(loaded.parameters(), build_model(settings).parameters(), strict=True):
        assert ours.equal(theirs)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_weights_in_4_bits_are_loaded_as_such(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    settings = Settings(**{**SMOKE, "trainable": "lora", "dtype": "bf16", "quantize": "nf4"})
    weights.save(settings, str(tmp_path))
    loaded: Any = build_model(dataclasses.replace(settings, weights=str(tmp_path)))
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert loaded.is_loaded_in_4bit and trained and all("lora_" in name for name in trained)
    quantised = [name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.uint8]
    assert len(quantised) == 2 * 7 and not any("lm_head" in name for name in quantised)


def test_lora_trains_adapters_on_every_linear_in_the_dtype_of_the_weights() -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    model = build_model(Settings(**{**SMOKE, "trainable": "lora", "dtype": "bf16"}))
    trained = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}


def test_every_shape_is_a_config_of_transformers() -> None:
    from transformers import AutoConfig

    for values in SHAPES.values():
        assert AutoConfig.for_model(**values).num_hidden_layers == values["num_hidden_layers"]


def test_a_smoke_run_writes_outside_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options, _ = cli.parse(["--smoke"])
    assert tmp_path in cli.output_file(options).parents
    options, _ = cli.parse([])
    assert cli.output_file(options) == Path("benchmark.json")


def test_only_the_last_folder_is_created(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, _ = cli.parse(["--out", str(tmp_path / "new" / "result.json")])
    cli.output_file(options)
    assert (tmp_path / "new").is_dir()
    for file, problem in ((tmp_path / "a" / "b" / "result.json", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(SystemExit):
            cli.parse(["--out", str(file)])
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_file_that_cannot_be_written_ends_the_run_at_once() -> None:
    options, _ = cli.parse(["--out", "/proc/result.json"])
    with pytest.raises(SystemExit, match=r"/proc/result\.json: cannot be written"):
        cli.output_file(options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stacks", "nothing"],
        ["--shape", "nothing"],
        ["--warmup", "0"],
        ["--lengths", "foo"],
        ["--device", "cuda"],
        ["--cap", "24"],
        ["--quantize", "nf4"],
    ],
)
def test_bad_options_end_with_a_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_cap_that_is_no_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        cli.parse(["--cap", "0"])
    assert "--cap is above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("cap", "fraction"), [("24", 0.3), ("200", 1.0)])
def test_the_sft_stacks_load_and_train_4_bit_weights_within_a_cap(
    cap: str, fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    monkeypatch.setattr(cli, "find_spec", lambda name: True)
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * 10**9),
        "set_per_process_memory_fraction": events.append,
        "get_device_name": lambda: "GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(worker, "find_stack", lambda name: lambda settings: events.append((name, settings)) or {})
    monkeypatch.setattr(weights.subprocess, "run", lambda command, check: events.append(command[2]))
    stacks = ["trl-flex-liger-every-2", "trl-fastft-planned-liger"]
    options, settings = cli.parse(["--cap", cap, "--quantize", "nf4", "--stacks", ",".join(stacks)])
    with weights.saved_weights(settings) as given:  # made in a process without a cap
        for name in options.stacks:
            file = tmp_path / name
            file.write_text(json.dumps(dataclasses.asdict(given)))
            worker.main(name, str(file), str(tmp_path / "out.json"))
    assert events[0] == "benchmarks.weights"
    assert events[1::2] == [fraction] * 2  # before the stack loads anything
    assert [name for name, _ in events[2::2]] == stacks
    assert {(one.quantize, one.weights) for _, one in events[2::2]} == {("nf4", given.weights)}


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
def test_every_nth_layer_is_an_option_of_the_stock_trainer(tmp_path: Path) -> None:
    from benchmarks.sft import make_config

    settings = Settings(**{**SMOKE, "checkpointing": True})
    kinds = {kind: f"trl-{kind}-every-2" for kind in ("sdpa", "flex", "fastft")}
    for kind, name in kinds.items():
        config = make_config(settings, SftStack.from_name(name), str(tmp_path))
        assert config.gradient_checkpointing_kwargs["every_n_layers"] == 2, kind
    assert not make_config(settings, SftStack("flex"), str(tmp_path)).gradient_checkpointing_kwargs


def test_help_explains_the_stacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    shown = capsys.readouterr().out
    assert "A B A B" in shown and "varlen-rebuilt" in shown and "padding collator" in shown


def test_smoke_run_of_the_checkpoint_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    from benchmarks import checkpoint_plans, checkpoint_plot, checkpoint_sweep

    monkeypatch.setattr(checkpoint_plans, "make_gauge", lambda device, budget: SimulatedDevice())
    out = tmp_path / "sweep.json"
    plans = "plain,early,planned,planned@80,offload,serial,every-2,keep-1,none,products,products+offload"
    sizes = ["--shape", "tiny-llama", "--layers", "3", "--tokens", "48", "--vocab", "64", "--steps", "1"]
    options = ["--plans", plans, "--dtype", "fp32", "--device", "cpu", "--out", str(out)]
    assert checkpoint_sweep.main([*sizes, *options]) == 0
    result = json.loads(out.read_text())
    assert sum(result["lengths"]) == 48
    assert list(result["plans"]) == plans.split(",")
    for outcome in result["plans"].values():
        assert outcome["status"] == "ok" and outcome["gradients"] == "equal" and len(outcome["step_ms"]) == 2
    assert result["plans"]["planned"]["planner"]["kept_layers"] == 3
    printed = capsys.readouterr().out
    assert "products+offload" in printed and "3 of 3 layers kept whole" in printed
    # On a CPU there are no peaks to draw: those of a GPU, in the place of these.
    for number, outcome in enumerate(result["plans"].values()):
        outcome["peak_bytes"] = number * 10**9
    out.write_text(json.dumps(result))
    pytest.importorskip("matplotlib")
    assert checkpoint_plot.main([str(out)]) == 0
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert checkpoint_plot.points([result])["early"][0] == 1.0


def test_a_sweep_of_one_plan_with_documents_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from benchmarks import checkpoint_plans, checkpoint_sweep

    calls: list[Any] = []

    class Seen(checkpoint_plans.AdaptersFirst):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self._checkpoint_fn)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(checkpoint_plans, "AdaptersFirst", Seen)
    lengths = []
    for seed in ("0", "1", "1"):
        sizes = ["--shape", "tiny-llama", "--layers", "3", "--tokens", "240", "--vocab", "64", "--steps", "1"]
        options = ["--plans", "keep-0", "--rounds", "1", "--longest", "100", "--seed", seed, "--dtype", "fp32"]
        calls.clear()
        assert checkpoint_sweep.main([*sizes, *options, "--device", "cpu", "--out", str(tmp_path / "out.json")]) == 0
        result = json.loads((tmp_path / "out.json").read_text())
        settings, lengths = result["settings"], [*lengths, result["lengths"]]
        assert (settings["longest"], settings["seed"], settings["tokens"]) == (100, int(seed), 240)
        assert sum(result["lengths"]) == 240 and max(result["lengths"]) == 100
        outcome = result["plans"]["keep-0"]
        assert outcome["status"] == "ok" and outcome["gradients"] == "equal"
        # Every layer's input is offloaded, and each goes through the order with the adapters first.
        assert calls and len(calls) % 3 == 0 and all(isinstance(one, OffloadCheckpoint) for one in calls)
    assert lengths[1] == lengths[2] != lengths[0]


def test_the_default_documents_of_a_sweep_are_those_of_earlier_results() -> None:
    pytest.importorskip("peft")
    from benchmarks.checkpoint_sweep import make_batch

    row = make_batch(16384, 4096, torch.device("cpu"))
    (known,) = RESULTS.glob("checkpointing_llama-8b_16k_all-plans_h200_*.json")
    assert list(row["fastft_metadata"].lengths) == json.loads(known.read_text())["lengths"]


def test_the_planner_is_compared_in_the_same_memory() -> None:
    from benchmarks import checkpoint_plot

    curve = {"planned@20": (20.0, 1.0), "planned": (40.0, 0.8)}
    others = {"plain": (20.0, 1.0), "every-2": (30.0, 1.0), "none": (90.0, 0.8), "offload": (10.0, 1.0)}
    assert checkpoint_plot.above(curve | others) == pytest.approx({"plain": 1.0, "every-2": 0.9, "none": 1.0})


def _ok(seconds: list[float]) -> dict[str, Any]:
    return {
        "status": "ok",
        "error": None,
        "first_step_s": 5.0,
        "step_s": seconds,
        "forward_s": [],
        "backward_s": [],
        "tokens_per_s": [100 / s for s in seconds],
        "peak_memory_bytes": None,
        "loss": [1.0] * len(seconds),
    }
