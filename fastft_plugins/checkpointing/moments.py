"""What a step takes at its moments, as a function of the row's length that costs microseconds to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastft_plugins.checkpointing.planner import Costs, Plan


def moments_of(costs: Costs, plan: Plan) -> list[tuple[float, float]]:
    """Bytes at each moment of a step that can be the worst one: what grows with the row, and what a shorter one keeps.

    In longer rows all of it grows in proportion. In shorter ones the fixed parts stay, and the rest is taken to stay,
    as the gradients in it do. Moments that are never the worst, at no length, are left out.
    """
    copied = costs.bytes_of(plan.copied)
    found = []
    # Held by the layers so far.
    growing = staying = 0.0  # of those kept whole
    inputs = on_device = products = moving = 0.0
    layers = zip(costs.whole, costs.inputs, costs.stored, costs.fixed, costs.rest, copied, strict=True)
    for position, (whole, own, stored, fixed, rest, leaving) in enumerate(layers):
        recomputed = recomputed_fixed = 0.0
        if position >= plan.run_again:
            growing, staying = growing + whole - fixed, staying + fixed
        else:
            if position in costs.staying:
                on_device += own
            else:
                inputs += own
            if plan.offloads:
                # What the layer that runs has offloaded, and the one fetched ahead. Products leave a layer later.
                most = 3 if plan.copied else 2
                inputs = min(inputs, most * max(costs.inputs[: position + 1]))
                moving = min(moving + leaving, 2 * max(copied[: position + 1]))
            recomputed, recomputed_fixed = whole - fixed - own, fixed
            if plan.stores(position):
                # These need not be among what a whole layer holds.
                products += stored - leaving
        held = inputs + on_device + products + moving + growing
        # In this layer's backward, those after it hold nothing any more.
        found.append((held + recomputed, staying + recomputed_fixed + rest))
    found.append((inputs + on_device + products + moving + growing, staying + costs.loss))
    return _worst(found)


def _worst(moments: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of which no other one has more of both."""
    kept: list[tuple[float, float]] = []
    for moment in sorted(moments, reverse=True):
        if not kept or moment[1] > kept[-1][1]:
            kept.append(moment)
    return kept
