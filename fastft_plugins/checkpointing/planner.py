"""How many layers are kept whole: a closed function of a row's length, what was measured, and the memory there is.

The last layers are kept, since their backward comes first and frees them soonest; the ones before are checkpointed.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What one forward does: the first ``checkpointed`` layers run again in the backward, the others are kept whole.

    ``offloads``: the inputs of the checkpointed ones wait in host memory.
    """

    checkpointed: int
    offloads: bool = False


@dataclass(frozen=True)
class Costs:
    """Bytes of a step with every layer checkpointed, and of what else its layers would hold, for one row of ``tokens``.

    ``whole``: of each layer, what it holds between forward and backward when it is kept whole, its input included.
    ``inputs``: of each layer, its input alone. ``fixed``: the part of ``whole`` that does not depend on the row.
    What else is there at the worst moment, the gradients so far included: ``loss``: between the last layer's forward
    and its backward; ``rest``: in each layer's backward.
    """

    tokens: int
    whole: tuple[int, ...]
    inputs: tuple[int, ...]
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
        layers = zip(self.whole, self.inputs, self.fixed, self.rest, strict=True)
        for position, (whole_then, input_then, fixed, rest) in enumerate(layers):
            whole, size = growth * (whole_then - fixed) + slowest * fixed, growth * input_then
            if position >= plan.checkpointed:
                held, recomputed = held + whole, 0.0
            else:
                held, recomputed = held + size, whole - size
                if plan.offloads:  # the input of the layer that runs, and the one fetched ahead
                    held = min(held, 2 * growth * max(self.inputs[: position + 1]))
            # In this layer's backward, those after it hold nothing any more.
            worst = max(worst, held + recomputed + slowest * rest)
        return max(worst, held + slowest * self.loss)


def choose(costs: Costs, tokens: int, room: float, *, always_offload: bool = False) -> Plan:
    """The plan that keeps the most layers whole in ``room`` bytes; it offloads only where it keeps more layers by that.

    If nothing fits, it is the plan that needs the least.
    """
    depth = len(costs.whole)
    best = Plan(depth, offloads=True)
    for offloads in (True,) if always_offload else (True, False):
        # Each layer less that is kept needs less, so the fewest that have to be checkpointed are found by halves.
        plans = [Plan(checkpointed, offloads) for checkpointed in range(depth + 1)]
        fewest = bisect_left(plans, True, key=lambda plan: costs.need(plan, tokens) <= room)
        if fewest <= best.checkpointed:
            best = plans[fewest]
    return best
