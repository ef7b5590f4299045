"""The planner under a whole Trainer on a GPU: results bit for bit, nothing that grows, compiled attention inside."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hf_helpers import documents, losses, make_trainer
from test_checkpointing_hf import ONLY, options_of
from test_gpu import small_model
from transformers import TrainerCallback

from benchmarks.shapes import checkpointing_argument
from fastft_plugins import FastFTCallback

pytestmark = pytest.mark.gpu

STEPS, LAYERS = 200, 6
OFF = {checkpointing_argument(): False}


class Memory(TrainerCallback):
    """What is allocated on the GPU after every 20th step, and this process's memory on the host."""

    def __init__(self):
        self.device, self.host = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 20:
            return
        gc.collect()
        self.device.append(torch.cuda.memory_allocated())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.host.append(pages * 4096)


def train(folder, model, callbacks, **options):
    options = {"use_cpu": False, "bf16": True, "per_device_train_batch_size": 16} | options_of() | options
    trainer = make_trainer(folder, model, callbacks=callbacks, data=documents(64, 200, 400), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("budget", ["little", "some", "auto"])
def test_two_hundred_steps_are_stock_and_nothing_grows(tmp_path, budget):
    model = small_model("llama", num_hidden_layers=LAYERS).float()
    model.set_attn_implementation("eager")
    peaks = []
    for options in (options_of(), OFF):
        torch.cuda.reset_peak_memory_stats()
        train(tmp_path, model, [], max_steps=8, **options)
        peaks.append(torch.cuda.max_memory_allocated())
    room = {"little": int(0.9 * peaks[0]), "some": sum(peaks) // 2, "auto": "auto"}[budget]
    memory, callback = Memory(), FastFTCallback(ONLY | {"memory_budget": room})
    stock, ours = (train(tmp_path, model, callbacks, max_steps=STEPS) for callbacks in ([], [callback, memory]))
    assert losses(ours) == losses(stock)
    for name, parameter in stock.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], parameter), name
    entry = callback.report.features["checkpointing"]
    print(entry.reason, entry.metrics, entry.changes, f"stock {peaks[0]:,}, whole {peaks[1]:,} bytes", sep="\n  ")
    print("device", memory.device, "host", memory.host)
    assert entry.enabled, entry.reason
    assert len(memory.device) == STEPS // 20
    assert max(memory.device[5:]) <= max(memory.device[:5])
    assert memory.host[-1] <= memory.host[2] + 16 * 2**20
    kept = entry.metrics.get("kept_layers", 0) + entry.metrics.get("stored_layers", 0)
    if budget == "little":
        assert entry.metrics["offloaded_layers"] > 0
    else:
        assert kept == LAYERS if budget == "auto" else 0 < kept < LAYERS


def test_flex_attention_in_checkpointed_layers(tmp_path):
    """Compiled inside the layers, packed: with the planner as without it, bit by bit, and as stock."""
    model = small_model("mistral", sliding_window=64)
    model.set_attn_implementation("flex_attention")
    runs = {}
    for mode in ("off", "on"):
        callback = FastFTCallback({"moe": "off", "packing": "on", "checkpointing": mode})
        runs[mode] = losses(train(tmp_path, model, [callback], max_steps=6))
        print(callback.report.features["checkpointing"].reason, callback.report.features["packing"].changes)
    assert callback.report.features["checkpointing"].enabled
    assert callback.report.features["packing"].enabled
    assert runs["on"] == runs["off"]
    assert runs["on"] == pytest.approx(losses(train(tmp_path, model, [], max_steps=6)), rel=2e-2)
