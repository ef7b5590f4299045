"""A plan in words, with the figures that it was made from."""

from __future__ import annotations

from fastft_plugins.checkpointing.planner import Costs, Plan

NOT_MEASURED = "no step has shown yet what its layers hold, so all of them were checkpointed"
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
