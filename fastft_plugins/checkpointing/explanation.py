"""A plan in words, with the figures that it was made from, or why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastft_plugins.checkpointing.planner import Costs, Plan

if TYPE_CHECKING:
    from fastft_plugins.checkpointing.planning import Planning

OVERLAP = (
    "forwards began before the backward of the one before, or layers were called several times in one, so from then on "
    "all layers were checkpointed"
)


def explain(costs: Costs, plan: Plan, tokens: int, room: float) -> str:
    """What ``plan`` does with a row of ``tokens`` tokens in ``room`` bytes."""
    depth = len(costs.whole)
    whole, products, inputs = (
        f"{sum(sizes) / depth / costs.tokens / 1e3:.3g} kB" for sizes in (costs.whole, costs.stored, costs.inputs)
    )
    where = ", the inputs of both in host memory" if plan.offloads else ""
    if plan.copied:
        copied = sum(costs.bytes_of(plan.copied)) / depth / costs.tokens / 1e3
        where += f" with {copied:.3g} kB a token of the products of each layer"
    return (
        f"rows of {tokens:,} tokens, {room / 1e9:.3g} GB to plan with: {depth - plan.run_again} of {depth} layers "
        f"kept whole, {plan.stored} with their products stored, {plan.checkpointed} checkpointed{where}; a layer "
        f"holds {whole} a token whole, {products} of products and {inputs} as its input; the rest is "
        f"{costs.loss / 1e9:.3g} GB at the loss and at most {max(costs.rest) / 1e9:.3g} GB in a layer's backward"
    )


def why_unplanned(planning: Planning) -> str:
    """What is known of why no forward has been planned so far."""
    if planning.measurement is None:
        why = (
            "no call of a layer was one to plan for: they are compiled, ran without gradients, under options or hooks "
            "of others, or call another function"
        )
    elif planning.costs is not None:
        why = "no forward was planned, as each had much longer rows, or more layers, than those measured before it"
    elif planning.measurement.costs() is None:
        why = "no forward was planned, and the backward of the newest one has not come through all layers"
    else:
        why = "too few forwards came to plan one: the first two show what the layers hold"
    return f"{why}; without a plan all layers are checkpointed"
