"""`PlannedCheckpoint`: in place of torch's checkpoint, runs again in the backward only what there is no memory for.

What is kept or stored are the same numbers that would be computed again: the results are torch's, bit by bit.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from fastft_plugins.checkpointing.engine import OffloadCheckpoint, may_offload
from fastft_plugins.checkpointing.gauge import Gauge
from fastft_plugins.checkpointing.measurement import Measurement
from fastft_plugins.checkpointing.planner import Costs, Plan, choose
from fastft_plugins.checkpointing.products import storing_products

# Keywords that are torch's checkpoint's own and not the layer's. The first ones say nothing to a layer that is kept
# whole; with the others the user has a plan of their own.
_OF_A_RECOMPUTE = {"preserve_rng_state", "determinism_check", "early_stop"}
_OF_USERS = {"context_fn", "debug"}
# A row this many times longer than the one measured is measured itself; up to there, costs are taken to grow with it.
_LONGER = 1.25
_STOCK = Plan(2**31)  # checkpoints any number of layers


class PlannedCheckpoint:
    """Called like `torch.utils.checkpoint.checkpoint`; measures the second step, and from then on plans each forward.

    Calls whose layer cannot be told (see `layer_of`) and calls with options that shape the recompute go to ``engine``.

    Args:
        gauge: of the device that the layers are on.
        engine: checkpoints the layers whose inputs are offloaded.
    """

    def __init__(self, gauge: Gauge, engine: OffloadCheckpoint) -> None:
        self.engine = engine
        self.costs: Costs | None = None
        self.forwards = 0  # that were planned
        self.calls: Counter[str] = Counter()  # "kept", "stored", "checkpointed", "offloaded", "retried"
        self._gauge = gauge
        self._positions: dict[nn.Module, int] = {}  # of the layers, in the order of their first calls
        self._is_warm = False  # whether a step has passed
        self._tokens = 0  # of the forward under way
        self._plan: Plan | None = None  # None while it is measured
        self._measurement: Measurement | None = None  # of the forward under way, or of the one before
        self._measured: Measurement | None = None  # that the costs are from
        self._backward: weakref.ref[_Backward] | None = None  # of the forward under way, or of the one before
        self._overlaps = False  # whether a forward has begun before the backward of the one before
        self._shortfall = 0.0  # bytes that were missing where kept layers ran out of memory
        self._longest: tuple[int, float, Plan] | None = None  # the longest row: tokens, room and plan

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        use_reentrant: bool | None = False,
        offload: bool = False,
        **kwargs: Any,
    ) -> Any:
        """See `torch.utils.checkpoint.checkpoint`; raises ValueError for ``use_reentrant=True``.

        ``offload``: inputs of layers that are not kept whole go to host memory in any case, in the first steps too.
        """
        layer = layer_of(function)
        source = args[0] if args else None
        if (
            layer is None
            or use_reentrant
            or not isinstance(source, Tensor)
            or not source.numel()
            or kwargs.keys() & _OF_USERS
            or not may_offload()
        ):
            return self.engine(function, *args, use_reentrant=use_reentrant, **kwargs)
        position = self._positions.setdefault(layer, len(self._positions))
        tokens = source.numel() // source.shape[-1] if source.dim() else 1
        if position == 0 or tokens != self._tokens:
            self._begin(tokens, offload)
        outputs = self._run(position, layer, function, *args, **kwargs)
        if self._backward is None:
            self._backward = _await_backward(outputs)
        return outputs

    def _run(self, position: int, layer: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the plan says of the layer at ``position``."""
        if self._plan is None:
            assert self._measurement is not None
            return self._measurement.run(position, layer, function, *args, **kwargs)
        checkpoint_fn: Callable[..., Any] = self.engine if self._plan.offloads else _checkpoint
        depth = 0 if self.costs is None else len(self.costs.whole)
        if position < self._plan.checkpointed or position >= depth:  # the latter was never measured
            self.calls["offloaded" if self._plan.offloads else "checkpointed"] += 1
            return checkpoint_fn(function, *args, **kwargs)
        if position >= self._plan.run_again:
            return self._try("kept", position, _keep, function, *args, **kwargs)
        assert self._measured is not None
        context_fn = functools.partial(storing_products, self._measured.count_products(position))
        run = functools.partial(checkpoint_fn, context_fn=context_fn)
        return self._try("stored", position, run, function, *args, **kwargs)

    def close(self) -> None:
        """Free the host memory, and forget the layers."""
        self.engine.close()
        self._positions.clear()
        self._plan, self._measurement = None, None

    def __reduce__(self) -> Any:
        """A copy or pickle, as part of a model, is torch's checkpoint: copies of a model are stock."""
        return functools.partial, (checkpoint,)

    def metrics(self) -> dict[str, float]:
        """Figures for a report; waits for the device."""
        figures = {"planned_forwards": float(self.forwards)}
        figures |= {f"{kind}_layers": calls / self.forwards for kind, calls in self.calls.items() if self.forwards}
        if self._measured is not None and self.calls["kept"] + self.calls["stored"]:
            layer_ms = self._measured.layer_milliseconds()
            figures |= {"layer_forward_ms": layer_ms, "recompute_saved_ms": layer_ms * figures.get("kept_layers", 0.0)}
        return figures | (self.engine.metrics() if self.engine.offloaded else {})

    def explain(self) -> str:
        """The plan of the longest row, and the figures that it was made from."""
        if self._overlaps:
            return "a forward began before the backward of the one before, so all layers were checkpointed from then on"
        if self._longest is None or self.costs is None:
            return "no step has shown yet what its layers hold, so all of them were checkpointed"
        tokens, room, plan = self._longest
        costs, depth = self.costs, len(self.costs.whole)
        whole, products, inputs = (
            f"{sum(sizes) / depth / costs.tokens / 1e3:.3g} kB" for sizes in (costs.whole, costs.products, costs.inputs)
        )
        where = ", the inputs of both in host memory" if plan.offloads else ""
        return (
            f"rows of {tokens:,} tokens, {room / 1e9:.3g} GB to plan with: {depth - plan.run_again} of {depth} layers "
            f"kept whole, {plan.stored} with their products stored, {plan.checkpointed} checkpointed{where}; a layer "
            f"holds {whole} a token whole, {products} of products and {inputs} as its input; the rest is "
            f"{costs.loss / 1e9:.3g} GB at the loss and at most {max(costs.rest) / 1e9:.3g} GB in a layer's backward"
        )

    def _begin(self, tokens: int, offload: bool) -> None:
        """A forward over rows of ``tokens`` tokens begins."""
        self._tokens = tokens
        before = None if self._backward is None else self._backward()
        self._overlaps |= before is not None and not before.is_done
        self._backward = None
        found = self._measurement.costs() if self._measurement is not None else None
        if found is not None:
            # The first step is not like the others: kernels are loaded in it, and memory is allocated for good.
            if self._is_warm:
                self.costs, self._measured = found, self._measurement
            self._is_warm, self._measurement = True, None
        elif self._measurement is not None:
            self._measurement.abandon()
        if self._overlaps:
            # The first forward would take the memory that the others need: a plan for all of them is not known.
            self._plan = replace(_STOCK, offloads=offload)
            return
        if self.costs is None or len(self.costs.whole) < len(self._positions) or tokens > _LONGER * self.costs.tokens:
            checkpoint_fn = self.engine if offload else checkpoint
            self._plan, self._measurement = None, Measurement(self._gauge, tokens, checkpoint_fn, offloads=offload)
            return
        room = self._gauge.room() - self._shortfall
        self._plan = choose(self.costs, tokens, room, always_offload=offload)
        self.forwards += 1
        if self._longest is None or tokens >= self._longest[0]:
            self._longest = tokens, room, self._plan

    def _try(self, how: str, position: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer as planned; if there is no memory for that after all, again, with only its input, offloaded."""
        random_state, device_states = torch.get_rng_state(), get_device_states(*args)
        try:
            outputs = run(*args, **kwargs)
        except torch.OutOfMemoryError:
            pass  # try again outside of this block: the error holds on to what the layer has allocated
        else:
            self.calls[how] += 1
            return outputs
        torch.set_rng_state(random_state)
        set_device_states(*device_states)
        self._plan_smaller(position)
        self.calls["retried"] += 1
        return self.engine(*args, **kwargs)

    def _plan_smaller(self, position: int) -> None:
        """What the layers from ``position`` on hold has no room: plan without it from now on, and a layer's more."""
        assert self.costs is not None and self._plan is not None
        kept = self._plan.run_again
        held = [*self.costs.products[:kept], *self.costs.whole[kept:]]
        self._shortfall += (sum(held[position:]) + max(held)) * self._tokens / self.costs.tokens
        self._plan = Plan(len(held), offloads=True)


class _Backward:
    """Lives as long as a forward's graph, and learns when the backward has come to its first layer."""

    is_done = False

    def finish(self, _: Tensor) -> None:
        self.is_done = True


def _await_backward(outputs: Any) -> weakref.ref[_Backward] | None:
    """Watch the graph of a layer's outputs; None if they have none."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            backward = _Backward()
            leaf.register_hook(backward.finish)
            return weakref.ref(backward)
    return None


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def _keep(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **{name: value for name, value in kwargs.items() if name not in _OF_A_RECOMPUTE})


def layer_of(function: Callable[..., Any]) -> nn.Module | None:
    """The layer that is called: ``function`` itself, the owner of a method, or what a partial calls or passes first."""
    if isinstance(function, nn.Module):
        return function
    if isinstance(function, functools.partial):
        found = (layer_of(candidate) for candidate in (function.func, *function.args[:1]))
        return next((layer for layer in found if layer is not None), None)
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None
