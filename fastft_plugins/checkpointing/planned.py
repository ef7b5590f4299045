"""`PlannedCheckpoint`: in place of torch's checkpoint, runs again in the backward only what there is no memory for.

What is kept or stored are the same numbers that would be computed again: the results are torch's, bit by bit.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing import explanation
from fastft_plugins.checkpointing.calls import (
    OF_USERS,
    checkpoint_layer,
    keep_layer,
    layer_of,
    leaves_traces,
    trains,
)
from fastft_plugins.checkpointing.engine import OffloadCheckpoint, may_offload
from fastft_plugins.checkpointing.forwards import Forwards
from fastft_plugins.checkpointing.gauge import Gauge
from fastft_plugins.checkpointing.planner import Plan
from fastft_plugins.checkpointing.planning import Planning
from fastft_plugins.checkpointing.products import LayerProducts
from fastft_plugins.checkpointing.random_state import RandomState
from fastft_plugins.checkpointing.signature import signature_of


class PlannedCheckpoint:
    """Called like `torch.utils.checkpoint.checkpoint`; measures the second step, and from then on plans each forward.

    Calls whose layer cannot be told (see `layer_of`) and calls with options that shape the recompute go to ``engine``.

    Args:
        gauge: of the device that the layers are on.
        engine: checkpoints the layers whose inputs are offloaded.
        model: whose gradients take memory that may not be taken yet when a forward is planned.
    """

    def __init__(self, gauge: Gauge, engine: OffloadCheckpoint, model: nn.Module | None = None) -> None:
        self.engine = engine
        self.planning = Planning(gauge, engine, model)
        self.plan: Plan | None = None  # of the newest forward; None if it has none
        self.forwards = 0  # that were planned
        # Of planned forwards: "kept", "stored", "checkpointed", "offloaded"; "retried".
        self.calls: Counter[str] = Counter()
        self._forwards = Forwards()
        self._is_inside = False  # a layer that is kept whole
        self._has_overlapped = False  # whether a forward has ever begun before the backward of the one before

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        use_reentrant: bool | None = False,
        offload: bool = False,
        stores_products: bool = True,
        **kwargs: Any,
    ) -> Any:
        """See `torch.utils.checkpoint.checkpoint`; raises ValueError for ``use_reentrant=True``.

        ``offload``: inputs of layers that are not kept whole go to host memory in any case, in the first steps too.
        ``stores_products``: whether the products of layers may be stored.
        """
        layer = layer_of(function)
        source = args[0] if args else None
        if (
            layer is None
            or use_reentrant
            or not isinstance(source, Tensor)
            or not source.numel()
            or kwargs.keys() & OF_USERS
            or not may_offload()
        ):
            return self.engine(function, *args, use_reentrant=use_reentrant, **kwargs)
        # What a layer holds when it is kept was measured with the layers inside of it checkpointed.
        if self._is_inside or not trains(layer, args, kwargs):
            return checkpoint_layer(function, *args, **kwargs)
        tokens, length = source.numel() // source.shape[-1], source.shape[-2] if source.dim() > 1 else 1
        if self._forwards.enter(layer, (tokens, length)):
            self._forward_ends()
            self._forwards.begin(layer, (tokens, length))
            if not self._has_overlapped:
                signature = signature_of(layer, function, args, kwargs)
                self.plan = self.planning.begin(layer, signature, tokens, length, always_offload=offload)
                self.forwards += self.plan is not None
        if self.plan is not None:
            outputs = self._follow_plan(layer, function, *args, **kwargs)
        elif (measurement := self.planning.measurement) is not None:
            outputs = measurement.run(layer, function, *args, stores_products=stores_products, **kwargs)
        else:
            checkpoint_fn: Callable[..., Any] = self.engine if offload else checkpoint_layer
            outputs = checkpoint_fn(function, *args, **kwargs)
        self._forwards.leave(outputs)
        return outputs

    def _follow_plan(self, layer: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        plan, known = self.plan, self.planning.measured
        assert plan is not None and known is not None
        position = known.positions.get(layer)
        if position is None:  # it was not there when that was measured
            self.planning.forget()
            self.calls["offloaded" if plan.offloads else "checkpointed"] += 1
            return (self.engine if plan.offloads else checkpoint_layer)(function, *args, **kwargs)
        if position >= plan.run_again and position not in known.measurement.changed:
            return self._try("kept", position, self._keep, function, *args, **kwargs)
        is_stored, copied = plan.stores(position), plan.copied[position] if plan.copied else frozenset()
        run: Callable[..., Any] = functools.partial(self._offload, position) if plan.offloads else checkpoint_layer
        if is_stored or copied:
            products = known.products.setdefault(layer, LayerProducts())
            if products.is_outdated:
                self.planning.forget()
            if plan.offloads:
                contexts = functools.partial(products.contexts, offloaded=copied, stores_others=is_stored)
                run = functools.partial(run, contexts=contexts)
            else:
                run = functools.partial(run, context_fn=products.contexts)
        if is_stored:
            return self._try("stored", position, run, function, *args, **kwargs)
        self.calls["offloaded" if plan.offloads else "checkpointed"] += 1
        return run(function, *args, **kwargs)

    def _keep(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_inside = True
        try:
            return keep_layer(function, *args, **kwargs)
        finally:
            self._is_inside = False

    def _offload(self, position: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        refused, stayed = self.engine.refused, self.engine.kept.total()
        outputs = self.engine(function, *args, **kwargs)
        if self.engine.refused > refused:  # planned for, but there was no room: not to be planned for again
            self.planning.may_offload = False
        elif self.engine.kept.total() > stayed:
            self.planning.keep_input(position)
        return outputs

    def close(self) -> None:
        """Free the host memory, and forget the layers."""
        self.engine.close()
        self.planning.known.clear()
        self.plan, self.planning.measurement = None, None

    def __reduce__(self) -> Any:
        """A copy or pickle, as part of a model, is torch's checkpoint: copies of a model are stock."""
        return functools.partial, (checkpoint,)

    def metrics(self) -> dict[str, float]:
        """Figures for a report; waits for the device."""
        figures = {"planned_forwards": float(self.forwards)}
        figures |= {f"{kind}_layers": calls / self.forwards for kind, calls in self.calls.items() if self.forwards}
        measured = self.planning.measured
        if measured is not None and self.calls["kept"] + self.calls["stored"]:
            figures |= {"layer_forward_ms": measured.measurement.layer_milliseconds}
        return figures | (self.engine.metrics() if self.engine.offloaded else {})

    def explain(self) -> str:
        """The plan of the longest row, and the figures that it was made from; or why there is none so far."""
        if self._has_overlapped:
            return explanation.OVERLAP
        if self.planning.longest is None:
            return explanation.why_unplanned(self.planning)
        tokens, room, plan, costs = self.planning.longest
        return explanation.explain(costs, plan, tokens, room)

    def _forward_ends(self) -> None:
        """The next one begins."""
        has_failed = self._forwards.is_unfinished and self.planning.has_failed()
        # Once is enough: the first of two would take the memory of the second, and nobody knows when that comes again.
        # An error holds on to the graph that it came of, which will have no backward.
        self._has_overlapped |= self._forwards.overlap and not has_failed
        self.planning.end()
        if has_failed and self.plan is not None:
            self.planning.fall_back()
        self.plan = None

    def _try(self, how: str, position: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer as planned; without memory for that, again with only its input, offloaded, where that is safe."""
        assert self.plan is not None
        random_state = RandomState(args[1].device)  # after the function comes its input
        try:
            outputs = run(*args, **kwargs)
        except torch.OutOfMemoryError:
            self.plan = self.planning.shrink(self.plan, position)
            if leaves_traces(layer_of(args[0])):
                raise
            # Try again outside of this block: the error holds on to what the layer has allocated.
        else:
            self.calls[how] += 1
            return outputs
        random_state.restore()
        self.calls["retried"] += 1
        return self.engine(*args, **kwargs)
