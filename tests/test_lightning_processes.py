"""Lightning in two CPU processes that torchrun starts: DDP and FSDP2, trained to the end and failing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_helpers import Module, declare_entry_points, loader, make_trainer
from process_helpers import run_in_two_processes

from fastft_lightning import again
from fastft_plugins import FastFTError, FastFTPlugin

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
    assert any(f"process {torch.distributed.get_rank()} of 2" in note for note in plugin.report.notes)
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


ALONE = """
import os
import sys
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning_helpers import OwnLossBesideTheModels, loader, make_trainer
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from fastft_lightning import again
from fastft_plugins import FastFTError, FastFTPlugin

torch.set_num_threads(1)
again._PATIENCE = timedelta(seconds=3)


class Sometimes(OwnLossBesideTheModels):
    \"\"\"From its second step on, whoever is one of ``ranks`` makes a loss of more than the model's.\"\"\"

    def __init__(self, ranks):
        super().__init__()
        self.ranks = ranks

    def loss(self, batch):
        is_own = self.global_rank in self.ranks and self.global_step
        return super().loss(batch) if is_own else self.model(**batch).loss


class Synchronized(Sometimes):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if "KIND" == "sync_dist":
            self.log("of all", loss, on_step=True, sync_dist=True)
        else:
            self.all_gather(loss.detach())
        return loss


class Sharded(Sometimes):
    def configure_model(self):
        for part in (*self.model.model.layers, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


KINDS = {
    "ddp": (Sometimes, lambda: DDPStrategy(process_group_backend="gloo")),
    "unused": (Sometimes, lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)),
    "sync_dist": (Synchronized, lambda: DDPStrategy(process_group_backend="gloo")),
    "all_gather": (Synchronized, lambda: DDPStrategy(process_group_backend="gloo")),
    "fsdp2": (Sharded, lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
}
make_module, make_strategy = KINDS["KIND"]


def train(ranks, plugins):
    module = make_module(ranks)
    options = {"strategy": make_strategy(), "devices": 2, "gradient_clip_val": None, "plugins": plugins}
    make_trainer(sys.argv[1], **options).fit(module, loader())
    assert "training_step" not in vars(module)
    weights = [getattr(each, "full_tensor", lambda: each)().detach() for each in module.parameters()]
    return module.losses, weights


rank = int(os.environ["RANK"])
for ranks in ([0, 1], [1]):
    plugin = FastFTPlugin()
    if "KIND" in ("fsdp2", "sync_dist", "all_gather") and ranks == [1]:
        with pytest.raises(FastFTError if rank == 1 else RuntimeError) as raised:
            train(ranks, [plugin])
        assert rank == 0 or "in some processes only" in str(raised.value)
        os._exit(0)
    losses, weights = train(ranks, [])
    ours, our_weights = train(ranks, [plugin])
    is_own = rank in ranks
    assert plugin.report.features["packing"].enabled != is_own
    assert len(ours) == len(losses) + is_own == 3 + is_own  # one step was run again
    assert_close(ours[:1] + ours[1 + is_own :], losses, rtol=2e-6, atol=2e-6)
    assert_close(our_weights, weights, rtol=2e-6, atol=2e-6)
"""


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(tmp_path: Path, kind: str) -> None:
    declare_entry_points(tmp_path)
    run_in_two_processes(tmp_path, SCRIPT.replace("KIND", kind))


@pytest.mark.parametrize("kind", ["ddp", "unused", "sync_dist", "all_gather", "fsdp2"])
def test_a_process_that_runs_a_step_again_alone(tmp_path: Path, kind: str) -> None:
    """The other one is not kept waiting; where it would be, by a sharded model or a collective, there is an error."""
    declare_entry_points(tmp_path)
    run_in_two_processes(tmp_path, ALONE.replace("KIND", kind))


class Store:
    """One that runs out of patience at once, while something else happens."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.store, self.meanwhile = torch.distributed.HashStore(), meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def wait(self, *arguments: Any) -> None:
        self.meanwhile()
        raise torch.distributed.DistStoreError


@pytest.mark.parametrize("is_in_time", [True, False])
def test_two_processes_never_disagree_about_a_step(monkeypatch, is_in_time: bool) -> None:
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(model=None))
    agreed = []

    def arrive() -> None:
        with contextlib.suppress(FastFTError):
            again.agree(trainer, has_collectives=False)
            agreed.append(True)

    store = Store(arrive if is_in_time else lambda: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    arrive()
    if not is_in_time:
        arrive()
    assert len(agreed) == (2 if is_in_time else 0)


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
