"""``fastft run``: scripts that know nothing of fastft train packed, with stock's losses; nothing happens without it."""

from __future__ import annotations

import importlib.machinery
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hf_helpers import losses, make_trainer, tiny_model
from lightning_helpers import Module, declare_entry_points, loader
from lightning_helpers import make_trainer as make_lightning_trainer
from torch.testing import assert_close

import fastft_hf.auto
from fastft_lightning import FastFTLightningCallback
from fastft_plugins import FastFTCallback, FastFTConfigError, FastFTPlugin, apply, auto
from fastft_plugins.cli import launch
from fastft_plugins.report import Report

TESTS = Path(__file__).parent
ROOT = TESTS.parent
AUTOSTART = ROOT / "fastft_plugins" / "autostart"

HF = """
import sys
from hf_helpers import losses, make_trainer, tiny_model
trainer = make_trainer(sys.argv[2], tiny_model())
trainer.train()
print("losses", losses(trainer))

from fastft_plugins import FastFTCallback
own = make_trainer(sys.argv[2], tiny_model(), callbacks=[FastFTCallback()])
ours = [each for each in own.callback_handler.callbacks if isinstance(each, FastFTCallback)]
print("callbacks", *(type(each).__name__ for each in ours))
assert "site_of_the_user" in sys.modules
sys.exit(7)
"""
TRL = """
import sys
import trl
from hf_helpers import losses, tiny_model
from trl_helpers import arguments, tokenizer, tokens
config = trl.SFTConfig(**arguments(sys.argv[1], gradient_checkpointing=False, max_length=64))
trainer = trl.SFTTrainer(tiny_model("qwen3"), config, train_dataset=tokens(), processing_class=tokenizer())
trainer.train()
print("losses", losses(trainer))
"""
LIGHTNING = """
import sys
from lightning_helpers import Module, loader, make_trainer
module, own_list = Module(), []
trainers = [make_trainer(sys.argv[1], callbacks=own_list) for _ in range(2)]
trainers[1].fit(module, loader())
print("losses", module.losses)
print("callbacks", *(type(each).__name__ for each in trainers[1].callbacks))
"""


def fastft_run(folder: Path, script: str, *command: str, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(script)
    path = os.pathsep.join(map(str, [*paths, ROOT, ROOT / "integrations", TESTS, *filter(None, sys.path)]))
    return subprocess.run(
        [sys.executable, "-m", "fastft_plugins", "run", *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def printed(done: subprocess.CompletedProcess, word: str) -> str:
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{word} ")]
    assert len(lines) == 1, done.stdout + done.stderr
    return lines[0].removeprefix(f"{word} ")


def test_a_transformers_script(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "site_of_the_user.py").touch()
    (site / "sitecustomize.py").write_text("import sys, site_of_the_user; assert __name__ in sys.modules")
    options = ("--config", "packing=on", "--config", "strict=true", "--report", "report.json")
    done = fastft_run(tmp_path, HF, *options, "script.py", "--config", "out", paths=(site,))
    stock = make_trainer(tmp_path, tiny_model())
    stock.train()
    assert_close(json.loads(printed(done, "losses")), losses(stock), rtol=2e-6, atol=2e-6)
    assert printed(done, "callbacks") == "FastFTCallback"
    assert done.returncode == 7
    assert "packing        on" in done.stderr and "padding_removed" in done.stderr
    report = Report.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert report.state == "finished" and report.features["packing"].metrics["packed_batches"] == 5


def test_a_trl_script_below_a_launcher(tmp_path):
    command = ("-m", "accelerate.commands.launch", "--cpu", "script.py", "out")
    done = fastft_run(tmp_path, TRL, *command)
    assert done.returncode == 0, done.stderr
    from trl_helpers import sft_trainer, tokens

    stock = sft_trainer(tmp_path, tokens())
    stock.train()
    assert_close(json.loads(printed(done, "losses")), losses(stock), rtol=2e-6, atol=2e-6)
    assert "packing        on" in done.stderr


def test_a_lightning_script(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    declare_entry_points(site)
    done = fastft_run(tmp_path, LIGHTNING, "script.py", "out", paths=(site,))
    module = Module()
    make_lightning_trainer(tmp_path).fit(module, loader())
    assert_close(json.loads(printed(done, "losses")), module.losses, rtol=2e-6, atol=2e-6)
    assert printed(done, "callbacks").split().count("AutoLightningCallback") == 1
    assert "packing        on" in done.stderr


@pytest.fixture
def switched_on(monkeypatch):
    """transformers' default callbacks as they are under ``fastft run``, which has no config."""
    monkeypatch.setenv("FASTFT_AUTO", "1")
    monkeypatch.delenv("FASTFT_CONFIG", raising=False)
    before = list(transformers.trainer.DEFAULT_CALLBACKS)
    fastft_hf.auto.switch_on()
    fastft_hf.auto.switch_on()
    yield
    transformers.trainer.DEFAULT_CALLBACKS[:] = before


def test_trls_flag_goes_before_it(tmp_path, switched_on):
    from trl_helpers import sft_trainer, tokens

    for flag, expected in ((True, ["FlagCallback"]), (False, ["FlagCallback", "AutoCallback"])):
        trainer = sft_trainer(tmp_path, tokens(), fastft=flag, fastft_config={"packing": "off"} if flag else None)
        names = [type(each).__name__ for each in trainer.callback_handler.callbacks]
        assert [name for name in names if name in ("FlagCallback", "AutoCallback")] == expected
        assert names[-1] == expected[-1]
        trainer.train()
        assert trainer.callback_handler.callbacks[-1].report.features["packing"].enabled is not flag


def test_it_stays_out_of_a_block(tmp_path, switched_on, capsys):
    trainer = make_trainer(tmp_path, tiny_model())
    with apply(trainer, {"packing": "off"}) as run:
        trainer.train()
    assert trainer.callback_handler.callbacks[-1].report is run.report
    assert not run.report.features["packing"].enabled


def test_a_wrong_config_stops_the_first_trainer(tmp_path, switched_on, monkeypatch):
    monkeypatch.setenv("FASTFT_CONFIG", '{"packing": "onn"}')
    with pytest.raises(FastFTConfigError, match="FASTFT_CONFIG: packing='onn'"):
        make_trainer(tmp_path, tiny_model())


def test_lightnings_plugin_goes_before_it(tmp_path, switched_on, monkeypatch):
    (tmp_path / "site").mkdir()
    declare_entry_points(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    plugin, own = FastFTPlugin(), FastFTLightningCallback()
    for options, expected in (
        ({}, "AutoLightningCallback"),
        ({"plugins": [plugin]}, "FastFTLightningCallback"),
        ({"callbacks": [own]}, "FastFTLightningCallback"),
    ):
        trainer = make_lightning_trainer(tmp_path, **options)
        names = [type(each).__name__ for each in trainer.callbacks if isinstance(each, FastFTLightningCallback)]
        assert names == [expected]


def trl_trainer(folder, **options):
    from trl_helpers import sft_trainer, tokens

    return sft_trainer(folder, tokens(), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: make_trainer(folder, tiny_model()),
        lambda folder: make_trainer(folder, tiny_model(), callbacks=[FastFTCallback(), FastFTCallback()]),
        lambda folder: trl_trainer(folder, fastft=True),
    ],
    ids=["nobody", "callbacks", "flag"],
)
def test_the_report_is_shown_and_saved_once_whoever_asked(tmp_path, switched_on, monkeypatch, capsys, make):
    monkeypatch.setenv("FASTFT_REPORT", str(tmp_path / "report.json"))
    make(tmp_path).train()
    assert capsys.readouterr().err.count("packing        on") == 1
    report = Report.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert report.state == "finished" and report.features["packing"].enabled


@pytest.mark.parametrize(
    "options",
    [dict, lambda: {"plugins": [FastFTPlugin()]}, lambda: {"callbacks": [FastFTLightningCallback() for _ in range(2)]}],
    ids=["nobody", "plugin", "callbacks"],
)
def test_a_report_of_lightning_as_well(tmp_path, switched_on, monkeypatch, capsys, options):
    (tmp_path / "site").mkdir()
    declare_entry_points(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("FASTFT_REPORT", str(tmp_path / "report.json"))
    make_lightning_trainer(tmp_path, **options()).fit(Module(), loader())
    assert capsys.readouterr().err.count("packing        on") == 1
    assert json.loads((tmp_path / "report.json").read_text())["state"] == "finished"


def test_nothing_happens_without_the_variable():
    program = "import sys; print(len(sys.meta_path), sys.path, 'fastft_plugins.config' in sys.modules)"
    outputs = []
    for path in ([], [str(AUTOSTART)]):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTFT_")}
        environment["PYTHONPATH"] = os.pathsep.join([*path, str(ROOT)])
        outputs.append(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True))
    stock, ours = outputs
    assert ours.stdout == stock.stdout and not ours.stderr and "False" in ours.stdout


def test_a_python_without_fastft_says_so(tmp_path):
    """Without ``site``, Python finds nothing that is installed; the user's own module still gets its turn."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("print('of the user')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(AUTOSTART), str(site)]), "FASTFT_AUTO": "1"}
    command = [sys.executable, "-S", "-c", "import sitecustomize; print(sitecustomize.__file__)"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "does not have fastft_plugins" in done.stderr and "stock" in done.stderr
    assert done.stdout.splitlines() == ["of the user", str(site / "sitecustomize.py")]


def test_signals_reach_the_program(tmp_path):
    done = fastft_run(tmp_path, "", "sh", "-c", "kill -TERM $$")
    assert done.returncode == -signal.SIGTERM


def test_what_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    assert launch.resolve(["train.py", "--config", "x"]) == [sys.executable, "train.py", "--config", "x"]
    assert launch.resolve(["-m", "train"]) == [sys.executable, "-m", "train"]
    assert launch.resolve(["sh", "x"])[0].endswith("/sh")
    python = Path(sys.executable).name
    assert launch.resolve([python, "x"])[0] == str(Path(sys.executable).parent / python)


@pytest.mark.parametrize(
    ("command", "settings", "problem"),
    [
        (["none.py"], (), "none.py: no such script"),
        (["no-such-program"], (), "neither a Python script"),
        (["-m"], (), "names no module"),
        (["--confg", "x"], (), "--confg: is no option of fastft run"),
        (["sh"], ("packing",), "--config packing: is not FIELD=VALUE"),
        (["sh"], ("packing=onn",), "--config: packing='onn' is not allowed; allowed: 'auto', 'on', 'off'"),
        (["sh"], ("pakking=on",), "unknown field 'pakking'"),
        (["sh"], ("packing=[",), "not valid YAML"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(monkeypatch, command, settings, problem):
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("started"))
    with pytest.raises(FastFTConfigError) as raised:
        launch.launch(command, settings, None)
    assert problem in str(raised.value)


def test_the_environment_of_the_processes_below(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTFT_CONFIG", raising=False)
    inherited = {"PYTHONPATH": f"{AUTOSTART}{os.pathsep}mine", "OTHER": "kept"}
    made = launch.environment_for(["moe=off"], tmp_path / "report.json", inherited)
    assert made["PYTHONPATH"].split(os.pathsep) == [str(AUTOSTART), "mine"]
    assert made["FASTFT_AUTO"] == "1" and made["OTHER"] == "kept"
    assert json.loads(made["FASTFT_CONFIG"])["moe"] == "off"
    assert made["FASTFT_REPORT"] == str(tmp_path / "report.json")
    with pytest.raises(FastFTConfigError, match="does not exist"):
        launch.environment_for([], tmp_path / "none" / "report.json", inherited)


@pytest.mark.parametrize("text", ["{", '{"packing": "onn"}', "[]"])
def test_a_wrong_config_in_the_environment(monkeypatch, text):
    monkeypatch.setenv("FASTFT_CONFIG", text)
    with pytest.raises(FastFTConfigError, match="FASTFT_CONFIG"):
        auto.config()


def test_a_switch_that_fails_does_not_break_the_framework(tmp_path, monkeypatch, caplog):
    (tmp_path / "a_framework.py").write_text("loader = __spec__.loader")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(auto, "_SWITCHES", {"a_framework": "no_such_adapter"})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setenv("FASTFT_AUTO", "1")
    auto.wait_for_frameworks()
    import a_framework

    monkeypatch.delitem(sys.modules, "a_framework")
    assert isinstance(a_framework.loader, importlib.machinery.SourceFileLoader)
    assert a_framework.__loader__ is a_framework.loader
    assert "training stays stock (No module named 'no_such_adapter')" in caplog.text


def test_a_report_that_cannot_be_saved_is_no_error(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("FASTFT_REPORT", str(tmp_path))
    auto.announce(Report(model="Tiny"))
    assert "Tiny" in capsys.readouterr().err and "cannot be written" in caplog.text


def test_a_report_that_nobody_reads_is_no_error_and_is_saved(tmp_path, monkeypatch):
    """As after ``fastft run train.py 2>&1 | head``."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setenv("FASTFT_REPORT", str(tmp_path / "report.json"))
    with os.fdopen(writing, "wb", buffering=0) as closed:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(closed, write_through=True))
        auto.announce(Report(model="Tiny"))
    assert json.loads((tmp_path / "report.json").read_text())["model"] == "Tiny"
