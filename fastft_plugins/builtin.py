"""The plugin that brings this package's own features and kernels to the registry."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastft_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from fastft_plugins.kernels.dispatch import Kernel
    from fastft_plugins.run import Feature

# Where the kernels of each operation are, imported when the operation is first needed.
_KERNELS = {
    "attention": ("attention", "ATTENTION_KERNELS"),
    "counting_sort": ("counting_sort", "COUNTING_SORT_KERNELS"),
    "gather_rows": ("rows", "GATHER_KERNELS"),
    "combine_rows": ("rows", "COMBINE_KERNELS"),
    "segment_sum": ("rows", "SEGMENT_SUM_KERNELS"),
    "gate_forward": ("gate", "GATE_FORWARD_KERNELS"),
    "gate_backward": ("gate", "GATE_BACKWARD_KERNELS"),
    "grouped_matmul": ("grouped_matmul", "GROUPED_MATMUL_KERNELS"),
    "grouped_weight_grad": ("grouped_matmul", "GROUPED_WEIGHT_GRAD_KERNELS"),
    "grouped_weight_bias_grad": ("grouped_matmul", "GROUPED_WEIGHT_BIAS_GRAD_KERNELS"),
}


@hookimpl
def fastft_features() -> Sequence[Feature]:
    from fastft_plugins.checkpointing.feature import CheckpointingFeature
    from fastft_plugins.moe.feature import MoEFeature
    from fastft_plugins.packing.feature import PackingFeature

    return [PackingFeature(), CheckpointingFeature(), MoEFeature()]


@hookimpl
def fastft_kernels(op: str) -> Sequence[Kernel]:
    if op not in _KERNELS:
        return []
    module, name = _KERNELS[op]
    kernels: Sequence[Kernel] = getattr(importlib.import_module(f"fastft_plugins.kernels.{module}"), name)
    return kernels
