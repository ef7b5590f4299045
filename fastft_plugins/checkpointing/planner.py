"""What each layer holds until its backward: a closed function of a row's length, what was measured, and the memory.

Memory goes first where it saves the most time. Storing the products of every layer saves more for each byte than
keeping some layers whole (Llama-8B with LoRA, 16,384 tokens, H200: 8.0 against 6.2 ms a GB), so layers are kept whole
only once all products are stored. In either, the last layers come first: their backward frees them soonest.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What one forward does: the first ``checkpointed`` layers run again in the backward as a whole, the next
    ``stored`` ones without their products, which are stored, and the others are kept.

    ``offloads``: the inputs of layers that run again wait in host memory.
    """

    checkpointed: int
    stored: int = 0
    offloads: bool = False

    @property
    def run_again(self) -> int:
        """How many layers, the first ones, are not kept whole."""
        return self.checkpointed + self.stored


@dataclass(frozen=True)
class Costs:
    """Bytes of a step with every layer checkpointed, and of what else its layers would hold, for one row of ``tokens``.

    ``whole``: of each layer, what it holds between forward and backward when it is kept whole, its input included.
    ``inputs``: of each layer, its input alone. ``products``: of each layer, its products' outputs; 0 where they are not
    to be stored. ``fixed``: the part of ``whole`` that does not depend on the row.
    What else is there at the worst moment, the gradients so far included: ``loss``: between the last layer's forward
    and its backward; ``rest``: in each layer's backward.
    """

    tokens: int
    whole: tuple[int, ...]
    inputs: tuple[int, ...]
    products: tuple[int, ...]
    fixed: tuple[int, ...]
    rest: tuple[int, ...]
    loss: int

    def need(self, plan: Plan, tokens: int) -> float:
        """Bytes that a step on a row of ``tokens`` tokens takes at its worst moment, beside what was there before.

        In longer rows all of it grows in proportion. In shorter ones the fixed parts stay, and the rest is taken to
        stay, as the gradients in it do.
        """
        growth, slowest = tokens / self.tokens, max(1.0, tokens / self.tokens)
        worst = held = 0.0
        inputs = products = whole = 0.0  # held by the layers so far
        layers = zip(self.whole, self.inputs, self.products, self.fixed, self.rest, strict=True)
        for position, (whole_then, input_then, products_then, fixed, rest) in enumerate(layers):
            size = growth * (whole_then - fixed) + slowest * fixed
            recomputed = 0.0
            if position >= plan.run_again:
                whole += size
            else:
                inputs += growth * input_then
                if plan.offloads:  # the input of the layer that runs, and the one fetched ahead
                    inputs = min(inputs, 2 * growth * max(self.inputs[: position + 1]))
                recomputed = size - growth * input_then
                if position >= plan.checkpointed:
                    products += growth * products_then  # which need not be among what a whole layer holds
            held = inputs + products + whole
            # In this layer's backward, those after it hold nothing any more.
            worst = max(worst, held + recomputed + slowest * rest)
        return max(worst, held + slowest * self.loss)

    def plans(self, *, offloads: bool) -> list[Plan]:
        """What to do in more and more memory, read backwards: each plan needs no more than the one before it."""
        depth = len(self.whole)
        if not any(self.products):
            return [Plan(count, offloads=offloads) for count in range(depth + 1)]
        storing = [Plan(0, count, offloads) for count in range(depth + 1)]
        return storing + [Plan(count, depth - count, offloads) for count in range(1, depth + 1)]


def choose(costs: Costs, tokens: int, room: float, *, always_offload: bool = False, may_offload: bool = True) -> Plan:
    """The plan that runs the least again in ``room`` bytes; it offloads only where it runs less again by that.

    Plans are in the order of what they need to within one layer's products. If nothing fits, it is the last of them.
    """
    ways = (True,) if always_offload else (True, False) if may_offload else (False,)
    best, fewest = Plan(len(costs.whole), offloads=ways[0]), len(costs.plans(offloads=True)) - 1
    for offloads in ways:
        plans = costs.plans(offloads=offloads)
        first = bisect_left(plans, True, key=lambda plan: costs.need(plan, tokens) <= room)
        if first <= fewest:
            best, fewest = plans[first], first
    return best
