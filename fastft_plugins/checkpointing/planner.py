"""What each layer holds until its backward: a closed function of a row's length, what was measured, and the memory.

Memory goes first where it saves the most time. Storing the products of every layer saves more for each byte than
keeping some layers whole (Llama-8B with LoRA, 16,384 tokens, H200: 8.0 against 6.2 ms a GB), so layers are kept whole
only once all products are stored. In either, the last layers come first: their backward frees them soonest. Host memory
takes, besides the inputs, as many products of each layer that runs again as can be copied beside the computation.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastft_plugins.checkpointing.moments import moments_of

# Of what a layer's recompute takes, the part that its stored products save (the same model: 7.5 of 14.4 ms).
_PRODUCTS_SHARE = 0.5


@dataclass(frozen=True)
class Plan:
    """What one forward does: the first ``checkpointed`` layers run again in the backward as a whole, the next
    ``stored`` ones without their products, which are stored, and the others are kept.

    ``offloads``: the inputs of layers that run again wait in host memory. ``copied``: and of each layer these products,
    by their number; of the checkpointed layers too, which then run again without them. ``instead``: the layers whose
    products are stored, where they are not those ``stored`` ones.
    """

    checkpointed: int
    stored: int = 0
    offloads: bool = False
    copied: tuple[frozenset[int], ...] = ()
    instead: tuple[int, ...] | None = None

    def stores(self, position: int) -> bool:
        """Whether products of the layer at ``position`` are stored on the device."""
        return self.checkpointed <= position < self.run_again if self.instead is None else position in self.instead

    @property
    def run_again(self) -> int:
        """How many layers, the first ones, are not kept whole."""
        return self.checkpointed + self.stored


@dataclass(frozen=True)
class Costs:
    """Bytes of a step with every layer checkpointed, and of what else its layers would hold, for one row of ``tokens``.

    ``whole``: of each layer, what it holds between forward and backward when it is kept whole, its input included.
    ``inputs``: of each layer, its input alone. ``products``: of each layer, its products' outputs, one by one; none
    where they are not to be stored. ``fixed``: the part of ``whole`` that does not depend on the row.
    What else is there at the worst moment, the gradients so far included: ``loss``: between the last layer's forward
    and its backward; ``rest``: in each layer's backward. ``staying``: the positions of layers whose inputs stay on the
    device where a plan offloads them.
    """

    tokens: int
    whole: tuple[int, ...]
    inputs: tuple[int, ...]
    products: tuple[tuple[int, ...], ...]
    fixed: tuple[int, ...]
    rest: tuple[int, ...]
    loss: int
    staying: frozenset[int] = frozenset()

    @functools.cached_property
    def _moments(self) -> dict[Plan, list[tuple[float, float]]]:
        """Of each plan asked for so far; the same ones are asked for in every forward."""
        return {}

    @functools.cached_property
    def _plans(self) -> dict[tuple[bool, tuple[frozenset[int], ...]], list[Plan]]:
        return {}

    @functools.cached_property
    def stored(self) -> tuple[int, ...]:
        """Bytes of all products of each layer."""
        return tuple(map(sum, self.products))

    def need(self, plan: Plan, tokens: int) -> float:
        """Bytes that a step on a row of ``tokens`` tokens takes at its worst moment, beside what was there before."""
        moments = self._moments.get(plan)
        if moments is None:
            moments = self._moments[plan] = moments_of(self, plan)
        growth = tokens / self.tokens
        slowest = max(1.0, growth)
        return max(growth * growing + slowest * staying for growing, staying in moments)

    def again(self, plan: Plan) -> float:
        """How much runs again in the backward, in layers."""
        copied = sum(self.bytes_of(plan.copied)[: plan.checkpointed]) / max(1, sum(self.stored) / len(self.stored))
        return plan.checkpointed + (1 - _PRODUCTS_SHARE) * plan.stored - _PRODUCTS_SHARE * copied

    def bytes_of(self, copied: Sequence[frozenset[int]]) -> tuple[int, ...]:
        """Bytes of these products of each layer, in the row that was measured."""
        if not copied:
            return (0,) * len(self.whole)
        return tuple(sum(sizes[index] for index in chosen) for sizes, chosen in zip(self.products, copied, strict=True))

    def largest(self, nbytes: float, least: int = 1) -> tuple[frozenset[int], ...]:
        """Of each layer the products of ``least`` bytes or more that ``nbytes`` have room for, the largest first."""
        found = []
        for sizes in self.products:
            chosen, left = set(), nbytes
            for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
                if least <= sizes[index] <= left:
                    chosen.add(index)
                    left -= sizes[index]
            found.append(frozenset(chosen))
        return tuple(found) if any(found) else ()

    def plans(self, *, offloads: bool, copied: tuple[frozenset[int], ...] = ()) -> list[Plan]:
        """What to do in more and more memory, read backwards: each plan needs no more than the one before it."""
        if (offloads, copied) not in self._plans:
            depth = len(self.whole)
            if any(self.products):
                plans = [Plan(0, count, offloads, copied) for count in range(depth + 1)]
                plans += [Plan(count, depth - count, offloads, copied) for count in range(1, depth + 1)]
            else:
                plans = [Plan(count, offloads=offloads) for count in range(depth + 1)]
            self._plans[offloads, copied] = plans
        return self._plans[offloads, copied]


def with_others_stored(costs: Costs, plan: Plan, positions: Sequence[int], tokens: int, room: float) -> Plan:
    """``plan`` with products of as many of the layers at ``positions`` stored as have room, and of no others.

    ``plan`` itself if there is room for none of them.
    """
    counts = range(min(plan.stored, len(positions)), 0, -1)
    plans = (replace(plan, instead=tuple(positions[-count:])) for count in counts)
    return next((each for each in plans if costs.need(each, tokens) <= room), plan)


def choose(
    costs: Costs,
    tokens: int,
    room: float,
    *,
    always_offload: bool = False,
    may_offload: bool = True,
    copied: tuple[frozenset[int], ...] = (),
) -> Plan:
    """The plan that runs the least again in ``room`` bytes; it offloads only where it runs less again by that.

    Plans are in the order of what they need to within one layer's products. If nothing fits, all layers are
    checkpointed. ``copied``: the products of each layer that there is time to copy to host memory.
    """
    ways = [(True, copied)] if copied and (always_offload or may_offload) else []
    ways += [(True, ())] if always_offload else [(True, ()), (False, ())] if may_offload else [(False, ())]
    best, fewest = Plan(len(costs.whole), offloads=always_offload or may_offload), float(len(costs.whole))
    for offloads, chosen in ways:
        plans = costs.plans(offloads=offloads, copied=chosen)
        first = bisect_left(plans, True, key=lambda plan: costs.need(plan, tokens) <= room)
        if first < len(plans) and (again := costs.again(plans[first])) <= fewest:
            best, fewest = plans[first], again
    return best
