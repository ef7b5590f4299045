"""Models under FSDP2's ``fully_shard``, in two CPU processes: packed runs are stock's, in a loop and in Lightning."""

from __future__ import annotations

from pathlib import Path

from process_helpers import run_in_two_processes

LOOP = """
import torch
import torch.distributed as dist
from hf_helpers import Pad, documents, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from fastft_plugins import apply

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def shard(model):
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)


def train(packing, sharded_inside=False):
    model = tiny_model("qwen3").train()
    if not sharded_inside:
        shard(model)
    with apply(model, {"packing": packing}) as run:
        if sharded_inside:
            shard(model)
        collator, rows, losses = run.collator(Pad()), documents(24), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for start in range(4 * dist.get_rank(), 24, 8):
            loss = model(**collator(rows[start : start + 4])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    weights = [parameter.full_tensor().detach() for parameter in model.parameters()]
    return losses, weights, run.report.features["packing"]


losses, weights, _ = train("off")
for sharded_inside in (False, True):
    packed_losses, packed_weights, packing = train("on", sharded_inside)
    assert packing.metrics["packed_batches"] == len(losses) == 3
    assert_close(packed_losses, losses, rtol=2e-6, atol=2e-6)
    assert_close(packed_weights, weights, rtol=0, atol=2e-6)


class Own(LlamaForCausalLM):
    pass


own = Own(tiny_model().config)
shard(own)
with apply(own) as run:
    assert "Own is not transformers' own class" in run.report.features["packing"].reason
"""
LIGHTNING = """
import sys

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_helpers import Module, loader, make_trainer
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from fastft_lightning import FastFTLightningCallback

torch.set_num_threads(1)


class Sharded(Module):
    def configure_model(self):
        for part in (*self.model.model.layers, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def train(callbacks):
    module, strategy = Sharded(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    make_trainer(sys.argv[1], strategy=strategy, devices=2, gradient_clip_val=None, callbacks=callbacks).fit(
        module, loader()
    )
    return module.losses, [parameter.full_tensor().detach() for parameter in module.parameters()]


losses, weights = train([])
callback = FastFTLightningCallback({"packing": "on"})
packed_losses, packed_weights = train([callback])
assert callback.report.features["packing"].metrics["packed_batches"] == len(losses) == 3
assert_close(packed_losses, losses, rtol=2e-6, atol=2e-6)
assert_close(packed_weights, weights, rtol=0, atol=2e-6)
"""


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    run_in_two_processes(tmp_path, LOOP)


def test_lightnings_model_parallel_strategy(tmp_path: Path) -> None:
    run_in_two_processes(tmp_path, LIGHTNING)
