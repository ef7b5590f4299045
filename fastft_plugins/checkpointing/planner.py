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
    and its backward; ``rest``: in each layer's backward.
    """

    tokens: int
    whole: tuple[int, ...]
    inputs: tuple[int, ...]
    products: tuple[tuple[int, ...], ...]
    fixed: tuple[int, ...]
    rest: tuple[int, ...]
    loss: int

    @functools.cached_property
    def stored(self) -> tuple[int, ...]:
        """Bytes of all products of each layer."""
        return tuple(map(sum, self.products))

    def need(self, plan: Plan, tokens: int) -> float:
        """Bytes that a step on a row of ``tokens`` tokens takes at its worst moment, beside what was there before.

        In longer rows all of it grows in proportion. In shorter ones the fixed parts stay, and the rest is taken to
        stay, as the gradients in it do.
        """
        growth, slowest = tokens / self.tokens, max(1.0, tokens / self.tokens)
        copied = self.bytes_of(plan.copied)
        worst = held = 0.0
        inputs = products = moving = whole = 0.0  # held by the layers so far
        layers = zip(self.whole, self.inputs, self.stored, self.fixed, self.rest, copied, strict=True)
        for position, (whole_then, input_then, products_then, fixed, rest, copied_then) in enumerate(layers):
            size = growth * (whole_then - fixed) + slowest * fixed
            recomputed = 0.0
            if position >= plan.run_again:
                whole += size
            else:
                inputs += growth * input_then
                if plan.offloads:
                    # What the layer that runs has offloaded, and the one fetched ahead. Products leave a layer later.
                    most = 3 if plan.copied else 2
                    inputs = min(inputs, most * growth * max(self.inputs[: position + 1]))
                    moving = min(moving + growth * copied_then, 2 * growth * max(copied[: position + 1]))
                recomputed = size - growth * input_then
                if plan.stores(position):
                    # These need not be among what a whole layer holds.
                    products += growth * (products_then - copied_then)
            held = inputs + products + moving + whole
            # In this layer's backward, those after it hold nothing any more.
            worst = max(worst, held + recomputed + slowest * rest)
        return max(worst, held + slowest * self.loss)

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
        depth = len(self.whole)
        if not any(self.products):
            return [Plan(count, offloads=offloads) for count in range(depth + 1)]
        storing = [Plan(0, count, offloads, copied) for count in range(depth + 1)]
        return storing + [Plan(count, depth - count, offloads, copied) for count in range(1, depth + 1)]


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
        if first < len(plans) and costs.again(plans[first]) <= fewest:
            best, fewest = plans[first], costs.again(plans[first])
    return best
