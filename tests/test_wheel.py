"""The built wheel, installed with its own dependencies into an empty environment, trains there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PACKAGES = {"fastft_plugins", "fastft_hf", "fastft_lightning", "fastft_trl"}

TRAIN = """
import sys, torch, transformers, fastft_plugins
assert "site-packages" in fastft_plugins.__file__, fastft_plugins.__file__
config = transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  num_key_value_heads=1, vocab_size=50)
rows = [{"input_ids": [1 + i % 7] * (2 + i % 5), "attention_mask": [1] * (2 + i % 5)} for i in range(16)]

def pad(features):
    longest = max(len(f["input_ids"]) for f in features)
    ids = torch.tensor([f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

callback = fastft_plugins.FastFTCallback({"packing": "on"})
arguments = transformers.TrainingArguments(sys.argv[1], max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
trainer = transformers.Trainer(transformers.LlamaForCausalLM(config), arguments, data_collator=pad, train_dataset=rows,
                               callbacks=[callback])
trainer.train()
assert callback.report.features["packing"].metrics["packed_batches"] == 2
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "fastft_plugins/kernels/cuda/grouped_matmul.cu" in names
    assert "fastft_plugins/autostart/sitecustomize.py" in names  # no package, but `fastft run` puts it in PYTHONPATH


def test_the_wheel_trains_in_an_empty_environment(wheel, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints" / "cpu.txt", f"{wheel}[hf]")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(python, "-c", TRAIN, tmp_path / "out", cwd=tmp_path, env=outside)
    listed = run(tmp_path / "venv" / "bin" / "fastft", "plugins", cwd=tmp_path, env=outside)
    assert "hf" in listed and "loaded" in listed
