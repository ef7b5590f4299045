"""What a forward and backward with every layer checkpointed show of the memory and time of each layer.

Nothing is computed for it that checkpointing would not compute anyway: what a layer would hold when kept whole is what
its recompute in the backward leaves allocated, and its products are those that its recompute comes to.
"""

from __future__ import annotations

import functools
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastft_plugins.checkpointing.gauge import Gauge
from fastft_plugins.checkpointing.offloaded import version_counter
from fastft_plugins.checkpointing.planner import Costs
from fastft_plugins.checkpointing.product_modes import CountProducts

# Products are stored and found again by Python code at every operation, which takes about as long as the operation's
# launch. Where the host has no such time to spare, that would cost more than it saves.
_SPARE = 2.5
# Products save most of a layer's recompute. Where they take nearly what the layer takes whole, keeping it saves more.
_WORTH = 0.6


class Measurement:
    """One forward over rows of ``tokens`` tokens, begun now, and its backward. One at a time owns the gauge's peak.

    Args:
        checkpoint_fn: torch's checkpoint, or one that offloads the inputs, if ``offloads``.
        length: of the rows that the tokens are in.
        to_come: bytes of gradients that its backward makes.
    """

    def __init__(
        self,
        gauge: Gauge,
        tokens: int,
        checkpoint_fn: Callable[..., Any],
        *,
        offloads: bool,
        length: int,
        to_come: int,
    ) -> None:
        self.tokens = tokens
        self.length = length
        self.to_come = to_come
        self._gauge = gauge
        self._checkpoint = checkpoint_fn
        self._offloads = offloads
        self.positions: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # by order of call
        # The positions of layers whose outputs were changed in place after their forward. A layer that is kept whole
        # may need them as they were, where a recompute makes them again.
        self.changed: set[int] = set()
        self._is_over = False
        # Bytes by the layer's position: its input, what its recompute has left, and the peak in its backward.
        self._inputs: dict[int, int] = {}
        self._grown: dict[int, int] = {}
        self._peaks: dict[int, int] = {}
        self._copies: dict[int, int] = {}  # of the layer's weights, in the dtype of autocast
        self._products: dict[int, CountProducts] = {}
        self._launch_ms: list[float] = []  # of the host, for each layer's forward
        self._loss_peak = 0
        self._newest: int | None = None  # the layer whose backward is under way
        self._marks: list[tuple[Any, Any]] = []  # begin and end of each layer's forward
        gauge.restart_peak()
        self._before = gauge.allocated()

    def run(
        self, layer: nn.Module, function: Callable[..., Any], *args: Any, stores_products: bool, **kwargs: Any
    ) -> Any:
        """Checkpoint ``function``, a call of ``layer`` with its input as the first argument."""
        position = self.positions.setdefault(layer, len(self.positions))
        self._copies[position] = _autocast_copies(layer, args[0].device.type)
        is_recompute = False
        versions: list[tuple[Tensor, int]] = []

        def watched(*inputs: Any, **named: Any) -> Any:
            if self._is_over or not is_recompute:
                return function(*inputs, **named)
            self._enter_backward(position)
            if any(counter._version != version for counter, version in versions):
                self.changed.add(position)
            before = self._gauge.allocated()
            try:
                if not stores_products:
                    return function(*inputs, **named)
                with self._products.setdefault(position, CountProducts()):
                    return function(*inputs, **named)
            finally:  # torch ends a recompute by an exception once it has all that it needs
                self._grown[position] = max(0, self._gauge.allocated() - before)
                self._peaks[position] = self._gauge.peak()

        stores_products &= not is_compiled(layer)  # it may not compile under a mode of ours
        begin, clock = self._gauge.mark(), time.perf_counter()
        outputs = self._checkpoint(watched, *args, use_reentrant=False, **kwargs)
        is_recompute = True
        made = (leaf for leaf in tree_leaves(outputs) if type(leaf) is Tensor and leaf.requires_grad)
        versions += [(version_counter(leaf), leaf._version) for leaf in made if leaf.layout == torch.strided]
        self._launch_ms.append((time.perf_counter() - clock) * 1e3)
        self._marks.append((begin, self._gauge.mark()))
        self._gauge.restart_peak()  # what a forward takes for a moment, its recompute takes too, and is seen there
        has_backward = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(outputs))
        self._inputs[position] = args[0].nbytes if has_backward else 0
        if not has_backward:  # the graph begins at a later layer: nothing is held, however it is run
            self._grown[position] = self._peaks[position] = 0
        return outputs

    def abandon(self) -> None:
        """Another forward has begun first: its backward is not measured."""
        self._is_over = True

    def costs(self) -> Costs | None:
        """What it has shown; None before the backward has come through every layer."""
        positions = range(len(self._inputs))
        if not self._inputs or not self._inputs.keys() == self._grown.keys() == set(positions):
            return None
        inputs = tuple(self._inputs[position] for position in positions)
        whole = tuple(self._inputs[position] + self._grown[position] for position in positions)
        fixed = tuple(min(self._grown[position], self._copies[position]) for position in positions)
        # Offloaded, at least the input of the layer that runs is there, and that of the last one at the loss.
        there = [inputs[position] if self._offloads else sum(inputs[: position + 1]) for position in positions]
        rest = [
            max(0, self._peaks[position] - self._before - there[position] - self._grown[position])
            for position in positions
        ]
        # Of the first layer's backward only the recompute was seen. That of the second layer, with more held, is worse.
        loss = max(0, self._loss_peak - self._before - there[-1])
        products = [
            tuple(self._products[position].sizes) if position in self._products else () for position in positions
        ]
        if sum(inputs) + sum(map(sum, products)) > _WORTH * sum(whole) or not self._host_has_time():
            products = [()] * len(products)
        return Costs(self.tokens, whole, inputs, tuple(products), fixed, tuple(rest), loss)

    @functools.cached_property
    def layer_milliseconds(self) -> float:
        """Time of a layer's forward, the median of all; once its forward is over. Waits for the device, once."""
        return statistics.median(self._gauge.milliseconds(*marks) for marks in self._marks)

    def _host_has_time(self) -> bool:
        # Where the device is behind, a launch waits for it: the shortest one is the host's own time.
        return self.layer_milliseconds > _SPARE * min(self._launch_ms)

    def _enter_backward(self, position: int) -> None:
        """The backward reaches a layer: the peak so far is that of the layer after it, or of the loss."""
        peak = self._gauge.peak()
        if self._newest is None:
            self._loss_peak = peak
        else:
            self._peaks[self._newest] = peak
        self._newest = position
        self._gauge.restart_peak()


def is_compiled(layer: nn.Module) -> bool:
    """Whether `torch.compile` has been put on the layer or a part of it."""
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in layer.modules()
    )


def _autocast_copies(layer: nn.Module, device_type: str) -> int:
    """Bytes of the copies of weights that autocast makes, at most; the graph of a layer kept whole holds on to them."""
    if not torch.is_autocast_enabled(device_type):
        return 0
    dtype = torch.get_autocast_dtype(device_type)
    others = (weight for weight in layer.parameters() if weight.is_floating_point() and weight.dtype != dtype)
    return sum(weight.numel() * dtype.itemsize for weight in others)
