"""The MoE feature: hands its experts function to the adapters where there is something to win."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastft_plugins.device import training_device
from fastft_plugins.errors import Declined, NothingToWin
from fastft_plugins.kernels.dispatch import choices, forget
from fastft_plugins.kernels.triton_support import TensorCall, triton_rejects
from fastft_plugins.moe import load
from fastft_plugins.moe.experts import experts_forward

if TYPE_CHECKING:
    from fastft_plugins.run import Run

_OPS = (
    "grouped_matmul", "grouped_weight_grad", "grouped_weight_bias_grad", "counting_sort", "gate_forward",
    "gate_backward",
)  # fmt: skip


class MoEFeature:
    """One sort, one count and one offset pass, and kernels for everything around the experts' products."""

    name = "moe"

    def start(self, run: Run) -> str:
        """See `fastft_plugins.run.Feature`."""
        forget()  # what a run before this one chose
        useless = None if run.config.mode(self.name) == "on" else _why_useless(run.model)
        try:  # even where it is useless: the report then says what there is to serve
            changes = run.call("fastft_inject_router", experts_fn=experts_forward)
        except Declined as declined:
            raise declined if useless is None else NothingToWin(str(declined)) from declined
        if useless is not None:
            raise NothingToWin(f"nothing to win here, it {useless}; moe='on' would do it: {'; '.join(changes)}")
        run.report.features[self.name].changes.extend(changes)
        return "experts run as one sort and a few grouped products, deterministic"

    def measure(self, run: Run) -> dict[str, float]:
        """See `fastft_plugins.run.Feature`."""
        ratio = load.imbalance(run.model)
        return {} if ratio is None else {"expert_imbalance": ratio}

    def stop(self, run: Run) -> None:
        """See `fastft_plugins.run.Feature`."""
        entry = run.report.features[self.name]
        entry.metrics |= self.measure(run)
        load.forget(run.model)
        for op in _OPS:
            entry.changes.extend(f"{op} kernel: {choice}" for choice in choices(op))


def _why_useless(model: nn.Module) -> str | None:
    device = training_device(model)
    return "needs a parameter" if device is None else triton_rejects(TensorCall(device, torch.bfloat16))
