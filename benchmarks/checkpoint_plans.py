"""What each layer leaves on the GPU between forward and backward, as plans that can take turns on one model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.shapes import enable_checkpointing
from fastft_hf.adapter_first import AdaptersFirst
from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing.gauge import make_gauge
from fastft_plugins.checkpointing.handle import Lane
from fastft_plugins.checkpointing.planned import PlannedCheckpoint
from fastft_plugins.checkpointing.products import LayerProducts

Function = Callable[..., Any]


class SerialReload(OffloadCheckpoint):
    """What double buffering is measured against: nothing is fetched before it is needed."""

    def _lane(self, device: torch.device) -> Lane:
        lane = super()._lane(device)
        lane.fetch_ahead = lambda handle, current: None  # type: ignore[method-assign]
        return lane


class Plans:
    """Sets one plan after another on the decoder layers of ``model``.

    ``plain``: torch's checkpointing. ``none``: every layer kept whole. ``hf-offload``: transformers' ``offload=True``.
    ``every-N``: transformers' ``every_n_layers=N``. ``offload``: inputs offloaded, in every layer. ``serial``: the same
    with a single buffer, into which an input is fetched only once its layer's backward begins. ``keep-K``: the last K
    layers whole, the others' inputs offloaded. ``planned``: each layer as the planner decides; ``planned@G``: in G GB
    of GPU memory. ``early``: torch's checkpointing, with LoRA's last adapters before their base products, as in
    ``keep``, ``planned`` and the following. ``products``: the products of every layer stored; ``products+offload``:
    inside offloaded checkpoints. So ``keep-0`` is ``offload`` with the adapters first: no layer whole, all inputs
    offloaded, the least memory there is, and no base product at a layer's end computed again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        enable_checkpointing(model)
        self._hf_offload = _hf_offload(model, self.layers[0])
        self.offload = OffloadCheckpoint()
        self.planned: PlannedCheckpoint | None = None  # of the plan that is set
        self._planned: dict[str, PlannedCheckpoint] = {}  # by the plan's name; what they have learned stays

    @property
    def names(self) -> list[str]:
        """All plans that this machine can run; the ones that answer the most come first."""
        depth = len(self.layers)
        kept = [f"keep-{depth * share // 8}" for share in (4, 6, 7)]
        names = ["plain", "planned", "offload", "hf-offload", "every-2", "every-4", *kept, "none"]
        names += ["serial", "early", "products", "products+offload", "every-3", "every-8", "plain-again"]
        return [name for name in names if name != "hf-offload" or self._hf_offload is not None]

    def set(self, name: str) -> None:
        """Raises ValueError for a name that is no plan."""
        self.offload.close()
        self.planned = None
        if name.startswith("planned"):
            device = next(self.layers[0].parameters()).device
            if name not in self._planned:
                self._planned[name] = PlannedCheckpoint(make_gauge(device, "auto"), OffloadCheckpoint())
            self.planned = self._planned[name]
            self.offload = self.planned.engine
        else:  # a new engine: its figures are of this plan alone
            self.offload = SerialReload() if name == "serial" else OffloadCheckpoint()
        for index, layer in enumerate(self.layers):
            function = self._function(name, index)
            layer.gradient_checkpointing = function is not None
            layer._gradient_checkpointing_func = function or checkpoint

    def _function(self, name: str, index: int) -> Function | None:
        """What the layer ``index`` calls; None if it is kept whole."""
        kind, _, number = name.partition("-")
        stock = functools.partial(checkpoint, use_reentrant=False)
        ours, early = AdaptersFirst(self.offload), AdaptersFirst(stock)
        if name in ("plain", "plain-again"):
            return stock
        if name in ("offload", "serial"):
            return self.offload
        if self.planned is not None:
            return AdaptersFirst(self.planned)
        if name == "early":
            return early
        if name == "hf-offload":
            return self._hf_offload
        if name == "none":
            return None
        if kind == "every":
            return stock if index % int(number) == 0 else None
        if kind == "keep":
            return ours if index < len(self.layers) - int(number) else None
        if name in ("products", "products+offload"):
            return functools.partial(early if name == "products" else ours, context_fn=LayerProducts().contexts)
        raise ValueError(f"{name!r} is no plan; known: {', '.join(self.names)}")


def _hf_offload(model: nn.Module, layer: Any) -> Function | None:
    """The function that transformers gives its layers for ``offload=True``; None without a GPU, where it fails."""
    if not torch.cuda.is_available():
        return None
    enable_checkpointing(model, offload=True)
    function: Function = layer._gradient_checkpointing_func
    return function
