"""Lightning in two CPU processes that torchrun starts: DDP and FSDP2, trained to the end and failing."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning_helpers import Module, declare_entry_points, loader, make_trainer
from process_helpers import run_in_two_processes

from fastft_plugins import FastFTPlugin

SCRIPT = """
import os
import signal
import sys

import lightning
import pytest
import torch
from hf_helpers import Pad
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_helpers import Module, loader, make_trainer
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import AttentionInterface

from fastft_plugins import FastFTPlugin
from fastft_plugins.run import active_run

torch.set_num_threads(1)
EXACT, BF16 = {"rtol": 2e-6, "atol": 2e-6}, {"rtol": 2e-3, "atol": 2e-3}


class Sharded(Module):
    def configure_model(self):
        for part in (*self.model.model.layers, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Fails(lightning.Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1 and self.error is SIGTERMException:
            os.kill(os.getpid(), signal.SIGTERM)
        elif batch_idx == 1:
            raise self.error


class FailsAgain(lightning.Callback):
    def on_exception(self, trainer, module, exception):
        raise ValueError("again")


KINDS = {
    "ddp": (Module, lambda: DDPStrategy(process_group_backend="gloo")),
    "fsdp2": (Sharded, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
}
make_module, make_strategy = KINDS["KIND"]


def train(plugins, **options):
    module, strategy = make_module(), make_strategy()
    options = {"strategy": strategy, "devices": 2, "gradient_clip_val": None, "plugins": plugins, **options}
    make_trainer(sys.argv[1], **options).fit(module, loader())
    weights = [getattr(each, "full_tensor", lambda: each)().detach() for each in module.parameters()]
    return module.losses, weights


for precision, tolerance in (("32-true", EXACT), ("bf16-mixed", BF16)):
    losses, weights = train([], precision=precision)
    plugin = FastFTPlugin({"packing": "on"})
    packed_losses, packed_weights = train([plugin], precision=precision)
    assert plugin.report.features["packing"].metrics["packed_batches"] == len(losses) == 3
    assert_close(packed_losses, losses, **tolerance)
    assert_close(packed_weights, weights, **tolerance)

for error, callbacks, expected in (
    (RuntimeError("boom"), [], RuntimeError),
    (RuntimeError("boom"), [FailsAgain()], ValueError),
    (SIGTERMException, [], SIGTERMException),
):
    plugin, module, train_loader, strategy = FastFTPlugin({"packing": "on"}), make_module(), loader(), make_strategy()
    trainer = make_trainer(
        sys.argv[1], strategy=strategy, devices=2, gradient_clip_val=None, plugins=[plugin],
        callbacks=[Fails(error), *callbacks],
    )
    with pytest.raises(expected):
        trainer.fit(module, train_loader)
    name = error.__name__ if isinstance(error, type) else type(error).__name__
    assert plugin.report.state == f"stopped by {name}", plugin.report.state
    assert plugin.report.features["packing"].metrics["packed_batches"] == 2
    assert active_run(module) is None and "fastft" not in AttentionInterface._global_mapping
    assert not vars(strategy).keys() & {"process_dataloader", "batch_to_device", "training_step"}
    for part in module.model.modules():
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        assert not [hook for hook in hooks if type(hook).__module__.startswith("fastft")]
"""


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(tmp_path: Path, kind: str) -> None:
    declare_entry_points(tmp_path)
    run_in_two_processes(tmp_path, SCRIPT.replace("KIND", kind))


@pytest.mark.parametrize("plugins", [None, "ours"], ids=["stock", "ours"])
def test_lightning_itself_refuses_fsdp1_on_a_cpu(tmp_path: Path, plugins: str | None, monkeypatch) -> None:
    """So what is tested on CPUs is FSDP2, through Lightning's `ModelParallelStrategy`."""
    (tmp_path / "site").mkdir()
    declare_entry_points(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        make_trainer(tmp_path, strategy="fsdp", devices=2, plugins=plugins and [FastFTPlugin()])


def test_with_everything_off_the_trainer_trains_as_it_is(tmp_path: Path, monkeypatch) -> None:
    """No slowdown: nothing of ours is in the way of a step but the guard against packed batches."""
    (tmp_path / "site").mkdir()
    declare_entry_points(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    seen = []

    class Watches(Module):
        def on_train_batch_start(self, batch, batch_idx):
            hooks = [hook for part in self.modules() for name in HOOKS for hook in vars(part)[name].values()]
            seen.append((set(vars(self.trainer.strategy)), [type(hook).__name__ for hook in hooks]))

    for plugins in (None, [FastFTPlugin({"packing": "off", "checkpointing": "off", "moe": "off"})]):
        make_trainer(tmp_path, plugins=plugins).fit(Watches(), loader())
    (stock_strategy, stock_hooks), (strategy, hooks) = seen[0], seen[6]
    assert strategy == stock_strategy and stock_hooks == []
    assert hooks == ["_Guard"] * 3  # looks for one key among the arguments of the module, the model and its decoder
