"""From the router's choice to the order in which experts work on their rows.

Shape suffixes: T tokens, K experts of a token, S = T·K routed rows, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastft_plugins.kernels.counting_sort import counting_sort


class Routing(NamedTuple):
    """Int32 tensors on the device of the router's choice. A slot is token · K + k, a row its place in expert order.

    Attributes:
        order: ``[S]`` the slot of each row: a stable argsort of the flattened expert ids.
        inverse: ``[S]`` the row of each slot.
        counts: ``[E]`` rows of each expert.
        offsets: ``[E]`` where each expert's rows end, as torch's ``grouped_mm`` takes them.
    """

    order: Tensor
    inverse: Tensor
    counts: Tensor
    offsets: Tensor


def route(top_k_index_TK: Tensor, num_experts: int) -> Routing:
    """Sort the slots by expert, without waiting for the device.

    Ids of ``num_experts`` and above, as expert parallelism uses them for experts that live elsewhere, sort last and are
    not counted.

    Raises:
        ValueError: if the ids are no ``[T, K]`` integers, if there is no expert, or if T·K needs more than 31 bits.
    """
    dtype = top_k_index_TK.dtype
    if top_k_index_TK.dim() != 2 or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(
            f"top_k_index_TK: has shape {list(top_k_index_TK.shape)} and {dtype}; needs integers of shape [tokens, k]"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts: is {num_experts}; needs at least 1")
    if top_k_index_TK.numel() >= 2**31:
        raise ValueError(f"top_k_index_TK: has {top_k_index_TK.numel()} slots; needs fewer than 2**31")
    return Routing(*counting_sort(top_k_index_TK.reshape(-1), num_experts))
