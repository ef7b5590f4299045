"""How many layers are kept whole: a closed function of a row's length, what was measured, and the memory there is.

The last layers are kept, since their backward comes first and frees them soonest; the ones before are checkpointed.
"""

from __future__ import annotations

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
    ``inputs``: of each layer, its input alone. What else is there at the worst moment, the gradients so far included:
    ``loss``: between the last layer's forward and its backward; ``rest``: in each layer's backward.
    """

    tokens: int
    whole: tuple[int, ...]
    inputs: tuple[int, ...]
    rest: tuple[int, ...]
    loss: int

    def need(self, plan: Plan, tokens: int) -> float:
        """Bytes that a step on a row of ``tokens`` tokens takes at its worst moment, beside what was there before.

        Layers grow in proportion to the row. The rest does in longer rows; in shorter ones it is taken to stay, as
        the gradients in it do.
        """
        growth = tokens / self.tokens
        worst, held = 0.0, 0
        for position, (whole, size, rest) in enumerate(zip(self.whole, self.inputs, self.rest, strict=True)):
            recomputed = 0
            if position >= plan.checkpointed:
                held += whole
            else:
                held += size
                recomputed = whole - size
                if plan.offloads:  # the input of the layer that runs, and the one fetched ahead
                    held = min(held, 2 * max(self.inputs[: position + 1]))
            # In this layer's backward, those after it hold nothing any more.
            worst = max(worst, growth * (held + recomputed) + max(1.0, growth) * rest)
        return max(worst, growth * held + max(1.0, growth) * self.loss)


def choose(costs: Costs, tokens: int, room: float, *, always_offload: bool = False) -> Plan:
    """The plan that keeps the most layers whole in ``room`` bytes; it offloads only where it keeps more layers by that.

    If nothing fits, it is the plan that needs the least.
    """
    depth = len(costs.whole)
    for checkpointed in range(depth + 1):
        for offloads in (True,) if always_offload else (False, True):
            plan = Plan(checkpointed, offloads)
            if costs.need(plan, tokens) <= room:
                return plan
    return Plan(depth, offloads=True)
