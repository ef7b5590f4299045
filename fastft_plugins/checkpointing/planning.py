"""What a forward does: the plan for its row, from what was measured, the memory there is, and the way to the host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing.engine import OffloadCheckpoint
from fastft_plugins.checkpointing.gauge import Gauge
from fastft_plugins.checkpointing.gradients import GradientsToCome
from fastft_plugins.checkpointing.measurement import Measurement
from fastft_plugins.checkpointing.planner import Costs, Plan, choose, with_others_stored

# A row this many times longer than the one measured is measured itself; up to there, costs are taken to grow with it.
_LONGER = 1.25
# Of what the link to host memory could copy while a layer's forward runs, what is planned with.
_LINK_SHARE = 0.8


class Planning:
    """Plans each forward from the costs of a measured one. It runs while the device waits, so it counts microseconds.

    Args:
        gauge: of the device that the layers are on.
        engine: offloads what the plans offload.
        model: whose gradients take memory that may not be taken yet when a forward is planned.
    """

    def __init__(self, gauge: Gauge, engine: OffloadCheckpoint, model: nn.Module | None) -> None:
        self.costs: Costs | None = None
        self.measured: Measurement | None = None  # that the costs are from
        self.measurement: Measurement | None = None  # of the forward under way, or of the one before
        self.gradients = GradientsToCome(model)
        self.may_offload = True
        self.longest: tuple[int, float, Plan] | None = None  # the longest row: tokens, room and plan
        self._gauge = gauge
        self._engine = engine
        self._is_warm = False  # whether a step has passed
        self._shortfall = 0.0  # bytes that were missing where layers ran out of memory
        self._tokens = 0  # of the forward under way; those of a longer row count for more
        self._copied: tuple[float, tuple[frozenset[int], ...]] | None = None  # what a link of that speed has time for

    def begin_measurement(self, tokens: int, length: int, *, offloads: bool) -> None:
        """A forward begins now in which every layer is checkpointed, by the engine if it ``offloads``."""
        self.measurement = Measurement(
            self._gauge,
            tokens,
            self._engine if offloads else checkpoint,
            offloads=offloads,
            length=length,
            to_come=self.gradients.look_again(),
        )

    def end_measurement(self) -> None:
        """Learn from the forward before, if it was measured and its backward has come through."""
        measurement, self.measurement = self.measurement, None
        if measurement is None:
            return
        found = measurement.costs()
        if found is None:
            measurement.abandon()
            return
        # The first step is not like the others: kernels are loaded in it, and memory is allocated for good.
        if self._is_warm:
            self.costs, self.measured, self._copied = found, measurement, None
        self._is_warm = True

    def forget(self) -> None:
        """The layers are others now."""
        self.costs = None

    def covers(self, tokens: int, length: int, layers: int) -> bool:
        """Whether a forward of ``layers`` layers over ``tokens`` tokens in rows of ``length`` can be planned."""
        if self.costs is None or self.measured is None or len(self.costs.whole) < layers:
            return False
        return tokens <= _LONGER * self.costs.tokens and length <= _LONGER * self.measured.length

    def plan(self, tokens: int, length: int, *, always_offload: bool, checked: Callable[[], set[int]]) -> Plan:
        """The plan of a forward that begins now and is covered.

        ``checked``: the positions of the layers whose products have been.
        """
        assert self.costs is not None and self.measured is not None
        # Scores and masks of unpacked rows grow with the square of their length.
        self._tokens = int(tokens * max(1.0, length / self.measured.length))
        to_come = max(0, self.gradients.nbytes() - self.measured.to_come)
        room = self._gauge.room() - self._shortfall - to_come
        growth = max(1.0, self._tokens / self.costs.tokens)
        may_offload = self.may_offload and self._engine.holds([growth * size for size in self.costs.inputs])
        chosen = functools.partial(
            choose, self.costs, self._tokens, room, always_offload=always_offload, may_offload=may_offload
        )
        has_products = any(self.costs.products)
        speed = self._engine.speed() if has_products else None
        plan = chosen(copied=() if speed is None else self._copies(speed, growth))
        if plan.run_again and may_offload and has_products and speed is None:
            plan = chosen(always_offload=True)  # to know the link's speed
        known = checked() if plan.copied else range(plan.run_again)
        unknown = [position for position in range(plan.run_again) if position not in known]
        if unknown:  # what is copied has been checked before: meanwhile, as many layers as there is room for are
            plan = with_others_stored(self.costs, chosen(), unknown, self._tokens, room)
        if self.longest is None or tokens >= self.longest[0]:
            self.longest = tokens, room, plan
        return plan

    def shrink(self, plan: Plan, position: int) -> Plan:
        """What the layers from ``position`` on hold has no room: plan without it from now on, and a layer's more.

        Returns the plan for the rest of the forward under way.
        """
        assert self.costs is not None
        kept = plan.run_again
        held = [*self.costs.stored[:kept], *self.costs.whole[kept:]]
        self._shortfall += (sum(held[position:]) + max(held)) * self._tokens / self.costs.tokens
        return Plan(len(held), offloads=True)

    def keep_input(self, position: int) -> None:
        """The input of the layer at ``position`` cannot be offloaded: it counts as memory from now on."""
        assert self.costs is not None
        if position not in self.costs.staying:
            self.costs = replace(self.costs, staying=self.costs.staying | {position})

    def _copies(self, speed: float, growth: float) -> tuple[frozenset[int], ...]:
        """Of each layer, the products that there is time to copy to host memory beside its forward, and room for."""
        assert self.costs is not None and self.measured is not None
        if self._copied is None or self._copied[0] != speed:
            link = _LINK_SHARE * speed * self.measured.layer_milliseconds - max(self.costs.inputs)
            self._copied = speed, self.costs.largest(link, least=self._engine.min_bytes)
        _, copied = self._copied
        sizes = [sizes[index] for sizes, chosen in zip(self.costs.products, copied, strict=False) for index in chosen]
        return copied if self._engine.holds([growth * size for size in (*self.costs.inputs, *sizes)]) else ()
