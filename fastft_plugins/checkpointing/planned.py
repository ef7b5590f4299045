"""`PlannedCheckpoint`: in place of torch's checkpoint, runs again in the backward only what there is no memory for.

What is kept or stored are the same numbers that would be computed again: the results are torch's, bit by bit.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from fastft_plugins.checkpointing import explanation
from fastft_plugins.checkpointing.calls import OF_USERS, checkpoint_layer, keep_layer, layer_of, trains
from fastft_plugins.checkpointing.engine import OffloadCheckpoint, may_offload
from fastft_plugins.checkpointing.forwards import Forwards
from fastft_plugins.checkpointing.gauge import Gauge
from fastft_plugins.checkpointing.measurement import Measurement
from fastft_plugins.checkpointing.planner import Costs, Plan, choose, with_others_stored
from fastft_plugins.checkpointing.products import LayerProducts

# A row this many times longer than the one measured is measured itself; up to there, costs are taken to grow with it.
_LONGER = 1.25
# Of what the link to host memory could copy while a layer's forward runs, what is planned with.
_LINK_SHARE = 0.8


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
        self.costs: Costs | None = None
        self.forwards = 0  # that were planned
        # Of planned forwards: "kept", "stored", "checkpointed", "offloaded"; "retried".
        self.calls: Counter[str] = Counter()
        self._gauge = gauge
        self._model = None if model is None else weakref.ref(model)
        self._forwards = Forwards()
        # The layers in the order of their first calls, and those called without anything to train.
        self._positions: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._frozen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._products: weakref.WeakKeyDictionary[nn.Module, LayerProducts] = weakref.WeakKeyDictionary()
        self._is_warm = False  # whether a step has passed
        self._is_stale = False  # whether layers have come that were frozen when the costs were measured
        self._may_offload = True
        self._tokens = 0  # of the forward under way; those of a longer row count for more
        self.plan: Plan | None = None  # of the newest forward; None if it has none
        self._measurement: Measurement | None = None  # of the forward under way, or of the one before
        self._measured: Measurement | None = None  # that the costs are from
        self._shortfall = 0.0  # bytes that were missing where kept layers ran out of memory
        self._longest: tuple[int, float, Plan] | None = None  # the longest row: tokens, room and plan

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
        if not trains(layer, args, kwargs):
            self._frozen.add(layer)
            return checkpoint_layer(function, *args, **kwargs)
        if layer in self._frozen:
            self._frozen.discard(layer)
            self._is_stale = True
        tokens, length = source.numel() // source.shape[-1], source.shape[-2] if source.dim() > 1 else 1
        if self._forwards.enter(layer, (tokens, length)):
            self._begin(tokens, length, offload)
        position = self._positions.setdefault(layer, len(self._positions))
        if self.plan is not None:
            outputs = self._follow_plan(position, layer, function, *args, **kwargs)
        elif self._measurement is not None:
            outputs = self._measurement.run(position, layer, function, *args, stores_products=stores_products, **kwargs)
        else:
            checkpoint_fn: Callable[..., Any] = self.engine if offload else checkpoint_layer
            outputs = checkpoint_fn(function, *args, **kwargs)
        self._forwards.leave(outputs)
        return outputs

    def _follow_plan(
        self, position: int, layer: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        plan = self.plan
        assert plan is not None and self.costs is not None
        # A layer beyond those that were measured is checkpointed.
        is_measured = position < len(self.costs.whole)
        if is_measured and position >= plan.run_again:
            return self._try("kept", position, keep_layer, function, *args, **kwargs)
        is_stored = is_measured and plan.stores(position)
        copied = plan.copied[position] if is_measured and plan.copied else frozenset()
        run: Callable[..., Any] = self._offload if plan.offloads else checkpoint_layer
        if is_stored or copied:
            products = self._products.setdefault(layer, LayerProducts())
            if plan.offloads:
                contexts = functools.partial(products.contexts, offloaded=copied, stores_others=is_stored)
                run = functools.partial(run, contexts=contexts)
            else:
                run = functools.partial(run, context_fn=products.contexts)
        if is_stored:
            return self._try("stored", position, run, function, *args, **kwargs)
        self.calls["offloaded" if plan.offloads else "checkpointed"] += 1
        return run(function, *args, **kwargs)

    def _offload(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        stayed = self.engine.kept.total()
        outputs = self.engine(function, *args, **kwargs)
        if self.engine.kept.total() > stayed:  # planned for, but not possible: not to be planned for again
            self._may_offload = False
        return outputs

    def close(self) -> None:
        """Free the host memory, and forget the layers."""
        self.engine.close()
        self._positions.clear()
        self._products.clear()
        self.plan, self._measurement = None, None

    def __reduce__(self) -> Any:
        """A copy or pickle, as part of a model, is torch's checkpoint: copies of a model are stock."""
        return functools.partial, (checkpoint,)

    def metrics(self) -> dict[str, float]:
        """Figures for a report; waits for the device."""
        figures = {"planned_forwards": float(self.forwards)}
        figures |= {f"{kind}_layers": calls / self.forwards for kind, calls in self.calls.items() if self.forwards}
        if self._measured is not None and self.calls["kept"] + self.calls["stored"]:
            layer_ms = self._measured.layer_milliseconds()
            figures |= {"layer_forward_ms": layer_ms}
        return figures | (self.engine.metrics() if self.engine.offloaded else {})

    def explain(self) -> str:
        """The plan of the longest row, and the figures that it was made from."""
        if self._forwards.overlap:
            return explanation.OVERLAP
        if self._longest is None or self.costs is None:
            return explanation.NOT_MEASURED
        tokens, room, plan = self._longest
        return explanation.explain(self.costs, plan, tokens, room)

    def _begin(self, tokens: int, length: int, offload: bool) -> None:
        """A forward over ``tokens`` tokens in rows of ``length`` begins."""
        found = self._measurement.costs() if self._measurement is not None else None
        if found is not None:
            # The first step is not like the others: kernels are loaded in it, and memory is allocated for good.
            if self._is_warm:
                self.costs, self._measured = found, self._measurement
            self._is_warm, self._measurement = True, None
        elif self._measurement is not None:
            self._measurement.abandon()
        if self._is_stale:
            self._positions.clear()
            self.costs, self._is_stale = None, False
        self.plan, self._measurement = None, None
        if self._forwards.overlap:  # the first of two would take the memory of the second
            return
        if self._must_measure(tokens, length):
            checkpoint_fn = self.engine if offload else checkpoint
            self._measurement = Measurement(
                self._gauge, tokens, checkpoint_fn, offloads=offload, length=length, to_come=self._gradients_to_come()
            )
            return
        assert self.costs is not None and self._measured is not None
        # Scores and masks of unpacked rows grow with the square of their length.
        self._tokens = int(tokens * max(1.0, length / self._measured.length))
        to_come = max(0, self._gradients_to_come() - self._measured.to_come)
        room = self._gauge.room() - self._shortfall - to_come
        growth = max(1.0, self._tokens / self.costs.tokens)
        may_offload = self._may_offload and self.engine.holds([growth * size for size in self.costs.inputs])
        chosen = functools.partial(
            choose, self.costs, self._tokens, room, always_offload=offload, may_offload=may_offload
        )
        self.plan = chosen(copied=self._copied(growth))
        if self.plan.run_again and may_offload and any(self.costs.products) and self.engine.speed() is None:
            self.plan = chosen(always_offload=True)  # to know the link's speed
        unknown = self._unknown() if self.plan.copied else []
        if unknown:  # what is copied has been checked before: meanwhile, as many layers as there is room for are
            self.plan = with_others_stored(self.costs, chosen(), unknown, self._tokens, room)
        self.forwards += 1
        if self._longest is None or tokens >= self._longest[0]:
            self._longest = tokens, room, self.plan

    def _must_measure(self, tokens: int, length: int) -> bool:
        if self.costs is None or self._measured is None or len(self.costs.whole) < len(self._positions):
            return True
        return tokens > _LONGER * self.costs.tokens or length > _LONGER * self._measured.length

    def _copied(self, growth: float) -> tuple[frozenset[int], ...]:
        """Of each layer, the products that there is time to copy to host memory beside its forward, and room for."""
        assert self.costs is not None and self._measured is not None
        speed = self.engine.speed() if any(self.costs.products) else None
        if speed is None:
            return ()
        link = _LINK_SHARE * speed * self._measured.layer_milliseconds() - max(self.costs.inputs)
        copied = self.costs.largest(link, least=self.engine.min_bytes)
        sizes = [sizes[index] for sizes, chosen in zip(self.costs.products, copied, strict=False) for index in chosen]
        return copied if self.engine.holds([growth * size for size in (*self.costs.inputs, *sizes)]) else ()

    def _unknown(self) -> list[int]:
        """The positions of layers that are to run again and whose products have not been checked."""
        assert self.plan is not None
        known = {self._positions.get(layer) for layer, products in self._products.items() if products.is_known}
        return [position for position in range(self.plan.run_again) if position not in known]

    def _gradients_to_come(self) -> int:
        """Bytes of gradients that the next backward makes, as there are none yet to add to."""
        model = None if self._model is None else self._model()
        parameters = () if model is None else model.parameters()
        return sum(each.nbytes for each in parameters if each.requires_grad and each.grad is None)

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
        assert self.costs is not None and self.plan is not None
        kept = self.plan.run_again
        held = [*self.costs.stored[:kept], *self.costs.whole[kept:]]
        self._shortfall += (sum(held[position:]) + max(held)) * self._tokens / self.costs.tokens
        self.plan = Plan(len(held), offloads=True)
