"""What is calculated from the two runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastft_plugins.demo.train import Run


def run_figures(run: Run, real_tokens: Sequence[int]) -> dict[str, Any]:
    """Return one run's measurements; the sums and the median leave the first step out where enough remain."""
    seconds = sum(_warm(run.step_seconds))
    return {
        "losses": run.losses,
        "step_seconds": run.step_seconds,
        "step_cpu_seconds": run.step_cpu_seconds,
        "median_step_seconds": statistics.median(_warm(run.step_seconds)),
        "seconds": seconds,
        "cpu_seconds": sum(_warm(run.step_cpu_seconds)),
        "real_tokens_per_second": sum(_warm(real_tokens)) / seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
    }


def batch_tokens(documents: list[dict[str, Any]], batch_size: int) -> tuple[list[int], list[int]]:
    """Return for each batch its tokens without and with padding to the longest document."""
    lengths = [len(document["input_ids"]) for document in documents]
    rows = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return [sum(row) for row in rows], [max(row) * len(row) for row in rows]


def weight_differences(
    stock: dict[str, torch.Tensor], fastft: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return the largest difference of one trained weight, and the difference as a share of what training changed."""
    largest = difference = update = 0.0
    for name, weight in stock.items():
        delta = (fastft[name] - weight).double()
        largest = max(largest, delta.abs().max().item())
        difference += delta.square().sum().item()
        update += (weight.double() - start[name].double()).square().sum().item()
    return {
        "largest_weight_difference": largest,
        "weight_difference_over_update": (difference / update) ** 0.5 if update else 0.0,
    }


def relative_difference(ours: float, theirs: float) -> float:
    """Return the difference as a share of ``theirs``; infinite where only ``theirs`` is 0."""
    if ours == theirs:
        return 0.0
    return quotient(abs(ours - theirs), abs(theirs))


def quotient(dividend: float, divisor: float) -> float:
    """Divide; a file may hold a divisor of 0."""
    return dividend / divisor if divisor else math.inf


def _warm(values: Sequence[Any]) -> Sequence[Any]:
    """Leave the first step out, which warms up, where enough remain."""
    return values[1:] if len(values) >= 3 else values
