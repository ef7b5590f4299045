"""How evenly the router spreads its rows over the experts, seen in the counts that the experts' forward makes anyway.

Shape suffixes: E experts.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

# The rows of each expert in the last forward of each experts module, on the device.
_counts_E: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def remember(module: nn.Module, counts_E: Tensor) -> None:
    """Keep the counts of this forward in place of the last one's: nothing is computed, and nothing waits."""
    _counts_E[module] = counts_E


def imbalance(model: nn.Module) -> float | None:
    """Rows of the busiest expert over those of the average one, in the last forward, averaged over layers.

    1.0 is perfect balance, E is all rows on one expert; None if no experts ran. Waits for the device.
    """
    found = [_counts_E[module] for module in model.modules() if module in _counts_E]
    if not found:
        return None
    ratios = [counts_E.max() * counts_E.numel() / counts_E.sum().clamp(min=1) for counts_E in found]
    return float(torch.stack([ratio.to(ratios[0].device) for ratio in ratios]).mean())


def forget(model: nn.Module) -> None:
    """Release what is kept for ``model``."""
    for module in model.modules():
        _counts_E.pop(module, None)
