"""What a forward does: the plan for its row, from what was measured, the memory there is, and the way to the host."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import replace

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing.engine import OffloadCheckpoint
from fastft_plugins.checkpointing.expected_peak import ExpectedPeak
from fastft_plugins.checkpointing.gauge import Gauge
from fastft_plugins.checkpointing.gradients import GradientsToCome
from fastft_plugins.checkpointing.known import Known, KnownForwards
from fastft_plugins.checkpointing.measurement import Measurement
from fastft_plugins.checkpointing.planner import Costs, Plan, choose, with_others_stored

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
        self.known = KnownForwards()
        self.measured: Known | None = None  # that the newest plan is from, or that was measured last
        self.measurement: Measurement | None = None  # of the forward under way, or of the one before
        self.gradients = GradientsToCome(model)
        self.may_offload = True
        self.longest: tuple[int, float, Plan, Costs] | None = None  # the longest row: tokens, room, plan and its costs
        self._gauge = gauge
        self._expected = ExpectedPeak(gauge)
        self._engine = engine
        self._is_warm = False  # whether a step has passed
        self._failures = gauge.failures()  # when they were asked for last
        self._shortfall = 0.0  # bytes that were missing where layers ran out of memory
        self._tokens = 0  # of the forward under way; those of a longer row count for more
        self._signature: Hashable = None  # of the forward that is measured

    @property
    def costs(self) -> Costs | None:
        """Of the measured forward."""
        return None if self.measured is None else self.measured.costs

    def begin(
        self, layer: nn.Module, signature: Hashable, tokens: int, length: int, *, always_offload: bool
    ) -> Plan | None:
        """The plan of a forward over ``tokens`` tokens in rows of ``length`` that begins now with ``layer``.

        None if no forward has been measured that is like it; then it is measured itself.
        """
        to_come, trained = self.gradients.look()
        known = self.known.find((signature, trained), layer, tokens, length)
        if known is None:
            self._begin_measurement(signature, tokens, length, offloads=always_offload)
            return None
        self.measured = known
        return self._plan(known, tokens, length, to_come, always_offload=always_offload)

    def _begin_measurement(self, signature: Hashable, tokens: int, length: int, *, offloads: bool) -> None:
        """A forward begins now in which every layer is checkpointed, by the engine if it ``offloads``."""
        self.gradients.look_again()
        to_come, trained = self.gradients.look()
        self._signature = signature, trained
        self._expected.restart()
        checkpoint_fn = self._engine if offloads else checkpoint
        self.measurement = Measurement(
            self._gauge, tokens, checkpoint_fn, offloads=offloads, length=length, to_come=to_come
        )

    def end(self) -> None:
        """Learn from the forward before, if its backward has come through and it was measured, or took too much."""
        excess = self._expected.excess()
        if self.measured is not None:
            self.measured.excess += excess
        measurement, self.measurement = self.measurement, None
        if measurement is None:
            return
        found = measurement.costs()
        if found is None:
            measurement.abandon()
            return
        # The first step is not like the others: kernels are loaded in it, and memory is allocated for good.
        if self._is_warm:
            self.measured = Known(self._signature, measurement, found)
            self.known.add(self.measured)
        self._is_warm = True

    def forget(self) -> None:
        """What the newest plan was made from is not so any more."""
        if self.measured is not None:
            self.known.forget(self.measured)

    def _plan(self, known: Known, tokens: int, length: int, to_come: int, *, always_offload: bool) -> Plan:
        costs, measurement = known.costs, known.measurement
        # Scores and masks of unpacked rows grow with the square of their length.
        self._tokens = int(tokens * max(1.0, length / measurement.length))
        to_come = max(0, to_come - measurement.to_come)
        room = self._gauge.room() - self._shortfall - known.excess - to_come
        growth = max(1.0, self._tokens / costs.tokens)
        may_offload = self.may_offload and self._engine.holds([growth * size for size in costs.inputs])
        chosen = functools.partial(
            choose, costs, self._tokens, room, always_offload=always_offload, may_offload=may_offload
        )
        has_products = any(costs.products)
        speed = self._engine.speed() if has_products else None
        plan = chosen(copied=() if speed is None else self._copies(known, speed, growth))
        if plan.run_again and may_offload and has_products and speed is None:
            plan = chosen(always_offload=True)  # to know the link's speed
        checked = known.checked() if plan.copied else range(plan.run_again)
        unknown = [position for position in range(plan.run_again) if position not in checked]
        if unknown:  # what is copied has been checked before: meanwhile, as many layers as there is room for are
            plan = with_others_stored(costs, chosen(), unknown, self._tokens, room)
        if self.longest is None or tokens >= self.longest[0]:
            self.longest = tokens, room, plan, costs
        self._expected.expect(self._gauge.allocated() + to_come + costs.need(plan, self._tokens))
        return plan

    def shrink(self, plan: Plan, position: int) -> Plan:
        """What the layers from ``position`` on hold has no room: plan without it from now on, and a layer's more.

        Returns the plan for the rest of the forward under way.
        """
        assert self.costs is not None
        self._expected.pardon()
        self._failures = self._gauge.failures()  # this one is dealt with
        kept = plan.run_again
        held = [*self.costs.stored[:kept], *self.costs.whole[kept:]]
        self._shortfall += (sum(held[position:]) + max(held)) * self._tokens / self.costs.tokens
        return Plan(len(held), offloads=True)

    def has_failed(self) -> bool:
        """Whether memory has run out since this was asked last."""
        before, self._failures = self._failures, self._gauge.failures()
        return self._failures > before

    def fall_back(self) -> None:
        """A planned step ran out of memory outside of its layers' forwards, where it cannot be run again.

        The next one is torch's checkpointing and measured anew, and plans from then on leave a layer's memory free.
        """
        assert self.measured is not None
        costs = self.measured.costs
        self._shortfall += max(costs.whole) * self._tokens / costs.tokens
        self.forget()

    def keep_input(self, position: int) -> None:
        """The input of the layer at ``position`` cannot be offloaded: it counts as memory from now on."""
        assert self.measured is not None
        costs = self.measured.costs
        if position not in costs.staying:
            self.measured.costs = replace(costs, staying=costs.staying | {position})

    def _copies(self, known: Known, speed: float, growth: float) -> tuple[frozenset[int], ...]:
        """Of each layer, the products that there is time to copy to host memory beside its forward, and room for."""
        costs = known.costs
        if known.copied is None or known.copied[0] != speed:
            link = _LINK_SHARE * speed * known.measurement.layer_milliseconds - max(costs.inputs)
            known.copied = speed, costs.largest(link, least=self._engine.min_bytes)
        _, copied = known.copied
        sizes = [sizes[index] for sizes, chosen in zip(costs.products, copied, strict=False) for index in chosen]
        return copied if self._engine.holds([growth * size for size in (*costs.inputs, *sizes)]) else ()
