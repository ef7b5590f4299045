"""Puts rows in the order of their expert: one stable sort by counting, with everything a grouped matmul needs.

Shape suffixes: S routed rows, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft_plugins.kernels.dispatch import Kernel, choose
from fastft_plugins.kernels.triton_support import TensorCall, triton_kernel, triton_rejects


def counting_sort(ids_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort expert ids; ids outside [0, E) come last and are not counted. Never waits for the device.

    Returns:
        Four int32 tensors: ``order [S]``, the stable argsort; ``inverse [S]``, its inverse; ``counts [E]``; and
        ``offsets [E]``, the inclusive ends.
    """
    run = choose("counting_sort", TensorCall(ids_S.device, torch.float32)).kernel.run  # ids of any integer type
    order_S, inverse_S, counts_E, offsets_E = run(ids_S, num_experts)
    return order_S, inverse_S, counts_E, offsets_E


def reference_counting_sort(ids_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in plain torch."""
    device = ids_S.device
    ids_S = ids_S.long()  # before comparing: num_experts may not fit a narrower type
    buckets_S = torch.where((ids_S < 0) | (ids_S > num_experts), num_experts, ids_S)
    order_S = torch.argsort(buckets_S, stable=True)
    places_S = torch.arange(ids_S.numel(), dtype=torch.int32, device=device)
    inverse_S = torch.empty_like(places_S).scatter_(0, order_S, places_S)
    ones_S = torch.ones_like(places_S)
    # bincount would wait for the device, even with minlength
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int32, device=device).scatter_add_(0, buckets_S, ones_S)[:-1]
    return order_S.int(), inverse_S, counts_E, counts_E.cumsum(0, dtype=torch.int32)


COUNTING_SORT_KERNELS = (
    Kernel("Triton", 0, triton_rejects, triton_kernel("counting_sort", "counting_sort")),
    Kernel("reference", 100, lambda call: None, reference_counting_sort),
)
